"""The small omni-model: Qwen2.5-Omni's architecture, classes and files at 10 M parameters."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omnisift.audio_selection import AudioSelector
from omnisift.mini.files import thinker_config, write_model
from omnisift.mini.questions import CAPTION_PROMPTS, caption, draw_questions
from omnisift.mini.tiny import byte_tokenizer
from omnisift.mini.world import draw_scene

WIDTH = 256
SELECTOR_HIDDEN = 256
_VOCABULARY = 1024
_TOKENIZER_SEED, _TOKENIZER_SCENES = 77, 3000
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(system_prompt: str) -> PreTrainedTokenizerBase:
    """Learn a byte-pair vocabulary from the world's questions and captions."""

    def texts() -> Iterator[str]:
        for index in range(_TOKENIZER_SCENES):
            scene = draw_scene(_TOKENIZER_SEED, index)
            yield caption(scene)
            for question in draw_questions(scene, index, 8):
                yield question.text
                yield question.answer
            yield from CAPTION_PROMPTS
            yield f"system\n{system_prompt}"
            yield from ("user\n", "assistant\n")

    tokenizer: Any = byte_tokenizer()
    trained: PreTrainedTokenizerBase = tokenizer.train_new_from_iterator(texts(), _VOCABULARY)
    trained.chat_template = _CHAT_TEMPLATE
    return trained


def mini_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5OmniThinkerConfig:
    """Return the thinker's configuration.

    The towers look at little: vision windows of 2x2 tokens and no block over the whole frame,
    audio windows of 0.2 s. A small tower that sees everything writes the event into every token,
    and then no method has anything to choose.
    """
    return thinker_config(
        {
            "audio_config": {
                "d_model": 192,
                "encoder_layers": 3,
                "encoder_attention_heads": 6,
                "encoder_ffn_dim": 768,
                "n_window": 10,
                "output_dim": WIDTH,
            },
            "vision_config": {
                "depth": 4,
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_heads": 6,
                "out_hidden_size": WIDTH,
                "window_size": 56,
                "fullatt_block_indexes": [],
            },
            "text_config": {
                "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
                "hidden_size": WIDTH,
                "intermediate_size": 768,
                "num_hidden_layers": 7,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 4096,
                "rope_parameters": {
                    "rope_type": "default",
                    # Time has the first 12 frequencies: waves of 6 to 150 positions (6 s).
                    "rope_theta": 10_000.0,
                    "mrope_section": [12, 10, 10],
                },
            },
        },
        tokenizer.get_vocab(),
    )


def new_model(config: Qwen2_5OmniThinkerConfig, *, seed: int) -> Any:
    """Return an untrained thinker with a start that small models learn from.

    Every product keeps the size of its input (transformers' .02 is meant for thousands of
    columns), what is added to the residual stream starts at a part of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv3d):
                fan_in = module.weight[0].numel()
                added = name.endswith(("o_proj", "down_proj", "out_proj", "fc2", "attn.proj"))
                nn.init.normal_(module.weight, std=(0.4 if added else 1.0) * fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
    return model


def save_checkpoint(
    folder: Path,
    model: Any,
    selector: AudioSelector | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Write config.json, bfloat16 model.safetensors and the tokenizer to `folder`; return it."""
    write_model(folder, model, selector)
    tokenizer.save_pretrained(folder)
    return folder
