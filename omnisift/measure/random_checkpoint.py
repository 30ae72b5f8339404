"""Checkpoints of random weights: what two engines make of them can be compared at any size."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnisift.compressor import KeptTokens
from omnisift.layout import Modality, ModelLayout, place_block
from omnisift.mini.files import write_config, write_model
from omnisift.mini.tiny import byte_tokenizer, tiny_config


def write_random_llm(
    folder: Path, *, width: int, heads: int, kv_heads: int, layers: int, seed: int = 0
) -> Path:
    """Write a checkpoint with an LLM of these sizes, tiny towers and a byte-level tokenizer.

    Weights are wide enough that tokens far away, and their positions, change what is said.
    """
    config: Any = tiny_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size = width, 4 * width
    text.num_attention_heads, text.num_key_value_heads = heads, kv_heads
    text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
    half = width // heads // 2  # the published model splits its 64 as 16, 24, 24
    text.rope_parameters["mrope_section"] = [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]
    config.vision_config.out_hidden_size = config.audio_config.output_dim = width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
            else:
                wide = 1.0 if "embed_tokens" in name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.data.normal_(0.0, wide)
    write_model(folder, model)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_without_weights(folder: Path, config: Any) -> Path:
    """Write the configuration of a thinker and a byte-level tokenizer, and no weights."""
    write_config(folder, config)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_kept(width: int, *, grids: int, side: int, retain: float, seed: int) -> KeptTokens:
    """Return random tokens at the positions that a pruned video with sound would have."""
    block = place_block(
        ModelLayout(),
        grids=grids,
        height=side,
        width=side,
        seconds_per_grid=1.0,
        audio_tokens=25 * grids,
    )
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.choice(len(block.ids), round(retain * len(block.ids)), replace=False))
    generator = torch.Generator().manual_seed(seed)
    return KeptTokens(
        embeds=torch.randn(len(kept), width, generator=generator).bfloat16(),
        positions=block.positions[:, kept].astype(np.int32),
        modality=block.modality[kept],
        next_position=block.next_position,
        kept_index=kept.astype(np.int32),
        num_video_tokens=int((block.modality == Modality.VIDEO).sum()),
        num_audio_tokens=int((block.modality == Modality.AUDIO).sum()),
    )
