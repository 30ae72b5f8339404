"""A layer of the LLM, and what layers share, as functions of their weights.

The same products as transformers' modules, in fewer kernels.

Shapes: B sequences, L tokens, D width, H heads, d width of a head.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = tuple[Tensor, Tensor | None]  # weight, bias


def linear(module: Any) -> Linear:
    """Return a module's weight and bias."""
    return module.weight, module.bias


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x [..., D] scaled to a root mean square of 1, times the weight."""
    normed: Tensor = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of columns by their positions' angles."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, L, H * d] as [B, H, L, d]."""
    split: Tensor = x.unflatten(-1, (num_heads, -1))
    return split.transpose(1, 2)


class TextLayer(NamedTuple):
    """The weights of a layer of the LLM."""

    norm1: Tensor
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm2: Tensor
    gate: Linear
    up: Linear
    down: Linear
    eps: float

    @classmethod
    def of(cls, layer: Any) -> "TextLayer":
        """Take them from transformers' module."""
        attn, mlp = layer.self_attn, layer.mlp
        return cls(
            norm1=layer.input_layernorm.weight,
            q=linear(attn.q_proj),
            k=linear(attn.k_proj),
            v=linear(attn.v_proj),
            out=linear(attn.o_proj),
            norm2=layer.post_attention_layernorm.weight,
            gate=linear(mlp.gate_proj),
            up=linear(mlp.up_proj),
            down=linear(mlp.down_proj),
            eps=layer.input_layernorm.variance_epsilon,
        )


def text_layer(
    w: TextLayer, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_keys: int
) -> Tensor:
    """Run a layer of the LLM on [B, L, D]; `mask` bool [1, 1, L, L], cos and sin [B, 1, L, d]."""
    h = rms_norm(x, w.norm1, w.eps)
    query = rotate(split_heads(F.linear(h, *w.q), num_heads), cos, sin)
    key = rotate(split_heads(F.linear(h, *w.k), num_keys), cos, sin)
    value = split_heads(F.linear(h, *w.v), num_keys)
    shared = num_heads // num_keys
    attended = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(shared, dim=1),
        value.repeat_interleave(shared, dim=1),
        attn_mask=mask,
    )
    x = x + F.linear(attended.transpose(1, 2).flatten(2), *w.out)
    h = rms_norm(x, w.norm2, w.eps)
    return x + F.linear(F.silu(F.linear(h, *w.gate)) * F.linear(h, *w.up), *w.down)
