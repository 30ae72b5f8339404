"""Attention of several query heads over one key head, as one product.

transformers repeats keys and values for each query head where a mask is given. Here the query
heads of a group are further rows of the same product, so keys and values are read where they lie.

Shapes: B batch, H query heads, K key heads, G query heads of a key head (H / K), L queries,
S keys, d head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_grouped"


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from `query` [B, H, L, d] to `key` and `value` [B, K, S, d]; return [B, L, H, d].

    `attention_mask` [B, 1, L, S] is True where a query may look. Without one it is transformers'
    own causal attention. Called by transformers, which calls no dropout outside training.
    """
    if attention_mask is None:
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, **kwargs
        )
        return stock
    heads, key_heads = query.shape[1], key.shape[1]
    groups = heads // key_heads
    rows = query.unflatten(1, (key_heads, groups)).flatten(2, 3)  # [B, K, G * L, d]
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1), scale=scaling
    )
    return out.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2), None


def use_grouped_attention(text_model: Any) -> None:
    """Let an LLM of transformers attend so."""
    text_model.set_attn_implementation(GROUPED)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
