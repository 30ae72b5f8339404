"""Write models in the published file formats: config.json, model.safetensors, special tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5OmniThinkerConfig

from omnisift.audio_selection import AudioSelector
from omnisift.checkpoint import SELECTOR_PREFIX, published_name

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
_ID_FIELDS = {
    "audio_token_index": "<|AUDIO|>",
    "image_token_index": "<|IMAGE|>",
    "video_token_index": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}


def thinker_config(
    sizes: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> Qwen2_5OmniThinkerConfig:
    """Return a thinker's configuration of these sizes, its special ids from a vocabulary."""
    ids = {field: vocabulary[token] for field, token in _ID_FIELDS.items()}
    config = Qwen2_5OmniThinkerConfig.from_dict({**sizes, **ids})
    assert isinstance(config, Qwen2_5OmniThinkerConfig)
    return config


def write_config(folder: Path, config: Any) -> Path:
    """Write config.json of a full checkpoint with this thinker; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {
        "model_type": "qwen2_5_omni",
        "architectures": ["Qwen2_5OmniModel"],
        "enable_audio_output": False,
        "thinker_config": config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(full, indent=2))
    return folder


def write_model(folder: Path, model: Any, selector: AudioSelector | None = None) -> Path:
    """Write config.json and the weights in bfloat16, a selector's too; return the folder."""
    write_config(folder, model.config)
    weights: dict[str, Tensor] = {
        published_name(name): value for name, value in model.state_dict().items()
    }
    if selector is not None:
        weights |= {SELECTOR_PREFIX + name: value for name, value in selector.state_dict().items()}
    save_file(
        {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
