"""A tiny model with random weights in the published file formats, for the demo and the tests.

It exercises every line that the published model does; what it says is gibberish.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
)

from omnisift.audio_selection import AudioSelector
from omnisift.checkpoint import SELECTOR_PREFIX, published_name

_SPECIAL_TOKENS = (
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
_WIDTH = 64


def tiny_config() -> Qwen2_5OmniThinkerConfig:
    """Return the thinker's configuration: every kind of layer of the published one, twice."""
    ids = {name: 256 + index for index, name in enumerate(_SPECIAL_TOKENS)}
    config = Qwen2_5OmniThinkerConfig.from_dict(
        {
            "audio_config": {
                "d_model": 48,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "output_dim": _WIDTH,
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_heads": 4,
                "out_hidden_size": _WIDTH,
                "fullatt_block_indexes": [1],
            },
            "text_config": {
                "vocab_size": 256 + len(_SPECIAL_TOKENS),
                "hidden_size": _WIDTH,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [2, 3, 3],
                },
            },
            "audio_token_index": ids["<|AUDIO|>"],
            "image_token_index": ids["<|IMAGE|>"],
            "video_token_index": ids["<|VIDEO|>"],
            "audio_start_token_id": ids["<|audio_bos|>"],
            "audio_end_token_id": ids["<|audio_eos|>"],
            "vision_start_token_id": ids["<|vision_bos|>"],
            "vision_end_token_id": ids["<|vision_eos|>"],
        }
    )
    assert isinstance(config, Qwen2_5OmniThinkerConfig)
    return config


def write_tiny_model(folder: Path, *, seed: int = 0, selector: bool = False) -> Path:
    """Write config.json, model.safetensors and a byte-level tokenizer to `folder`; return it.

    `selector` adds random selector weights under their published names, so that the model
    counts as having a selector.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
        weights = {published_name(name): value for name, value in model.state_dict().items()}
        if selector:
            state = AudioSelector(_WIDTH, hidden=32).state_dict()
            weights |= {SELECTOR_PREFIX + name: value for name, value in state.items()}
    save_file(
        {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    full = {
        "model_type": "qwen2_5_omni",
        "architectures": ["Qwen2_5OmniModel"],
        "enable_audio_output": False,
        "thinker_config": config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(full, indent=2))
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer of bytes and the special tokens of Omni."""
    alphabet = sorted(ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(alphabet + list(_SPECIAL_TOKENS))},
        merges=[],
        additional_special_tokens=list(_SPECIAL_TOKENS),
        model_max_length=32768,
    )
