"""Random weights in the sizes of Qwen2.5-Omni-7B: time does not depend on what they are."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from omnisift.mini.files import write_model


def published_config() -> Qwen2_5OmniThinkerConfig:
    """Return the sizes of Qwen2.5-Omni-7B; transformers' defaults differ in the vision tower."""
    config = Qwen2_5OmniThinkerConfig.from_dict(
        {
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "window_size": 112,
            },
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [16, 24, 24],
                },
            },
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        }
    )
    assert isinstance(config, Qwen2_5OmniThinkerConfig)
    return config


def random_model(config: Any, device: torch.device, *, llm_layers: int) -> Any:
    """Make a thinker of these sizes with random weights, none of them zero."""
    config.text_config.num_hidden_layers = llm_layers
    config.text_config.layer_types = ["full_attention"] * llm_layers
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.02)
    return model.eval().requires_grad_(False)


def write_random_checkpoint(folder: Path, config: Any) -> Path:
    """Write a checkpoint of these sizes without LLM layers: what compression loads; return it."""
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return write_model(folder, random_model(config, device, llm_layers=0))
