"""A tiny model with random weights in the published file formats, for tests and quick benchmarks.

It exercises every line that the published model does; what it says is gibberish.
"""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
)

from omnisift.audio_selection import AudioSelector
from omnisift.mini.files import SPECIAL_TOKENS, thinker_config, write_model

_WIDTH = 64


def tiny_config() -> Qwen2_5OmniThinkerConfig:
    """Return the thinker's configuration: every kind of layer of the published one, twice."""
    return thinker_config(
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
                "vocab_size": 256 + len(SPECIAL_TOKENS),
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
        },
        {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)},
    )


def write_tiny_model(folder: Path, *, seed: int = 0, selector: bool = False) -> Path:
    """Write config.json, model.safetensors and a byte-level tokenizer to `folder`; return it.

    `selector` adds random selector weights under their published names, so that the model
    counts as having a selector.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_config())
        chosen = AudioSelector(_WIDTH, hidden=32) if selector else None
    write_model(folder, model, chosen)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer of bytes and the special tokens of Omni."""
    alphabet = sorted(ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(alphabet + list(SPECIAL_TOKENS))},
        merges=[],
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
    )
