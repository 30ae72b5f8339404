"""The LLM of a thinker: its layers compiled where that pays, and its first pass over a prompt.

Shapes: B prompts, L tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor


def decoder_of(model: Any) -> Any:
    """Return the LLM without its head; transformers moved it between 5.17 and 5.23."""
    return getattr(model.model, "language_model", model.model)


def compile_decoder(model: Any) -> None:
    """Compile norms and MLPs, whose many passes over memory fuse; attention is fused already.

    One graph serves all layers and all lengths. The first call of each takes seconds.
    """
    for layer in decoder_of(model).layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


@torch.inference_mode()
def prefill(model: Any, embeds_BLD: Tensor, positions_3BL: Tensor) -> tuple[Tensor, Any]:
    """Return the logits [B, V] behind the prompts and the cache of their keys and values.

    The thinker's own forward makes logits of every position, 2.8 GB for 9,216 tokens.
    """
    output = decoder_of(model)(inputs_embeds=embeds_BLD, position_ids=positions_3BL, use_cache=True)
    return model.lm_head(output.last_hidden_state[:, -1]), output.past_key_values
