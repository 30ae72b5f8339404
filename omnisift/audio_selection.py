"""VGAS, visually guided audio selection: which audio do the surviving video tokens ask for?

Shapes: C chunks, V video tokens, A audio tokens (both padded), D width, h hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnisift.float32_product import linear_float32


class AudioSelector(nn.Module):
    """Score the audio tokens of a chunk by cross-attention to its surviving video tokens.

    v = LN(W_v v), a = LN(W_a a), o = MultiheadAttention(a, v, v), x = LN(o + a),
    score = sigmoid(MLP(x)); OmniSIFT (arXiv 2602.04804), section on VGAS. Parameter names and
    shapes are those of the published checkpoint, where they stand under `thinker.compressor.`.
    """

    def __init__(self, width: int, hidden: int = 512, num_heads: int = 8) -> None:
        """Make an untrained selector for tokens of `width`; `num_heads` must divide `hidden`."""
        super().__init__()
        self.v_proj = nn.Linear(width, hidden)
        self.a_proj = nn.Linear(width, hidden)
        self.v_norm = nn.LayerNorm(hidden)
        self.a_norm = nn.LayerNorm(hidden)
        self.cross_attn = nn.MultiheadAttention(hidden, num_heads, batch_first=True)
        self.post_attn_norm = nn.LayerNorm(hidden)
        self.score_head = nn.Sequential(
            nn.Linear(hidden, hidden // 2), nn.SiLU(), nn.Linear(hidden // 2, 1)
        )

    def forward(self, video_CVD: Tensor, video_valid_CV: Tensor, audio_CAD: Tensor) -> Tensor:
        """Return the scores in (0, 1), [C, A]; every chunk needs at least one valid video token."""
        video = self.v_norm(_linear(self.v_proj, video_CVD))
        audio = self.a_norm(_linear(self.a_proj, audio_CAD))
        attended = self.post_attn_norm(self._attend(audio, video, video_valid_CV) + audio)
        first, last = self.score_head[0], self.score_head[2]
        hidden = F.silu(_linear(first, attended))
        scores: Tensor = last(hidden)
        return torch.sigmoid(scores.squeeze(-1))

    def _attend(self, audio_CAh: Tensor, video_CVh: Tensor, video_valid_CV: Tensor) -> Tensor:
        # nn.MultiheadAttention holds the published names; its forward materialises the weights
        # of every head where a key mask is given, the fused kernel does not.
        attention = self.cross_attn
        query_weight, key_value_weight = attention.in_proj_weight.split(
            [audio_CAh.shape[-1], 2 * audio_CAh.shape[-1]]
        )
        query_bias, key_value_bias = attention.in_proj_bias.split(
            [audio_CAh.shape[-1], 2 * audio_CAh.shape[-1]]
        )
        query = linear_float32(audio_CAh, query_weight, query_bias)
        projected = linear_float32(video_CVh, key_value_weight, key_value_bias)
        key, value = projected.chunk(2, dim=-1)

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            heads(query), heads(key), heads(value), attn_mask=video_valid_CV[:, None, None, :]
        )
        return _linear(attention.out_proj, attended.transpose(1, 2).flatten(2))


def _linear(layer: Any, x: Tensor) -> Tensor:
    return linear_float32(x, layer.weight, layer.bias)
