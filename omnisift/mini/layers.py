"""A layer of the LLM, and what layers share, as functions of their weights.

The same products as transformers' modules, in fewer kernels.

Shapes: B sequences, L tokens, D width, H heads, d width of a head.
"""

from typing import Any, NamedTuple, Self

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


class GatedLayer(NamedTuple):
    """The weights of a layer of the LLM, or of a block of the vision tower."""

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
    def of(cls, norm1: Any, attention: tuple[Any, Any, Any, Any], norm2: Any, mlp: Any) -> Self:
        """Take them from transformers' modules; `attention` is q, k, v, out."""
        q, k, v, out = (linear(part) for part in attention)
        gate, up, down = (linear(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        weights = norm1.weight, q, k, v, out, norm2.weight, gate, up, down
        return cls(*weights, eps=norm1.variance_epsilon)

    @classmethod
    def of_text(cls, layer: Any) -> Self:
        """Take those of a layer of the LLM."""
        attn = layer.self_attn
        attention = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
        return cls.of(layer.input_layernorm, attention, layer.post_attention_layernorm, layer.mlp)

    @classmethod
    def of_vision(cls, block: Any) -> Self:
        """Take those of a block of the vision tower."""
        attn = block.attn
        return cls.of(block.norm1, (attn.q, attn.k, attn.v, attn.proj), block.norm2, block.mlp)

    def finish(self, x: Tensor, attended_BHLd: Tensor) -> Tensor:
        """Return x [B, L, D] with what attention found added, and the gated MLP behind it."""
        x = x + F.linear(attended_BHLd.transpose(1, 2).flatten(2), *self.out)
        h = rms_norm(x, self.norm2, self.eps)
        gated = F.silu(F.linear(h, *self.gate)) * F.linear(h, *self.up)
        return x + F.linear(gated, *self.down)


def text_layer(
    w: GatedLayer, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_keys: int
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
    return w.finish(x, attended)
