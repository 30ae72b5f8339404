"""Qwen2.5-Omni's audio tower with all 2 s windows of all sounds in one attention call a layer.

Equal to the stock forward within rounding. Lengths are known on the host, so nothing is waited
for.

Shapes: W windows, T rows (20 ms each), F mel frames, D width.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnisift.segments import Segments, attend, has_varlen, make_segments, pack_linears
from omnisift.transfer import upload

log = logging.getLogger(__name__)


class _Layer(nn.Module):
    """One layer of the tower, its weights packed."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.num_heads: int = attention.num_heads
        weight, bias = pack_linears(
            (attention.q_proj, attention.k_proj, attention.v_proj), rows=attention.embed_dim
        )
        self.qkv_weight = nn.Parameter(weight, requires_grad=False)
        self.qkv_bias = nn.Parameter(bias, requires_grad=False)
        self.norm1, self.norm2 = layer.self_attn_layer_norm, layer.final_layer_norm
        self.out_proj, self.act = attention.out_proj, layer.activation_fn
        self.fc1, self.fc2 = layer.fc1, layer.fc2

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        projected = F.linear(self.norm1(x_TD), self.qkv_weight, self.qkv_bias)
        query, key, value = projected.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        x_TD = x_TD + self.out_proj(attend(query, key, value, segments).flatten(1))
        hidden: Tensor = self.fc2(self.act(self.fc1(self.norm2(x_TD))))
        return x_TD + hidden


class AudioTower:
    """Encode log-mel spectrograms with the packed weights of a stock tower."""

    def __init__(self, tower: Any) -> None:
        """Pack `tower` (a transformers `Qwen2_5OmniAudioEncoder`); it stays usable."""
        self.device: torch.device = tower.conv1.weight.device
        self.dtype: torch.dtype = tower.conv1.weight.dtype
        attention = tower.layers[0].self_attn
        self.varlen = has_varlen(
            self.device, self.dtype, attention.embed_dim // attention.num_heads
        )
        self.compiled = self.device.type == "cuda"
        self._tower = tower
        self._window: int = tower.n_window * 2  # mel frames
        self._layers = [_Layer(layer) for layer in tower.layers]
        if self.compiled:
            for layer in self._layers:  # one graph serves them all
                layer.compile(dynamic=True)
        log.info(
            "audio tower packed: %d layers, %s attention, %s",
            len(self._layers),
            "varlen" if self.varlen else "batched",
            "compiled" if self.compiled else "eager",
        )

    def __call__(self, mels: Sequence[Tensor]) -> Tensor:
        """Return the tokens [sum(n), D] of spectrograms float32 [128, F], each of 1 or more."""
        lengths = np.array([mel.shape[1] for mel in mels])
        sizes = np.concatenate([self._window_sizes(length) for length in lengths])
        rows = (sizes - 1) // 2 + 1
        width = self._window // 2
        valid = np.flatnonzero(np.arange(width) < rows[:, None])
        # Pairs of rows are averaged to tokens; a pair may span windows, never sounds.
        clip_rows = (lengths - 1) // 2 + 1
        starts = np.cumsum(clip_rows) - clip_rows
        first = np.concatenate(
            [start + np.arange(0, num - 1, 2) for start, num in zip(starts, clip_rows, strict=True)]
        )
        valid_T, first_N, sizes_W = upload([valid, first, sizes], self.device)
        x_TD = self._convolve(mels, sizes_W).flatten(0, 1)[valid_T]
        segments = make_segments(rows, self.device, varlen=self.varlen)
        for layer in self._layers:
            x_TD = layer(x_TD, segments)
        pooled = (x_TD[first_N] + x_TD[first_N + 1]) / 2
        tokens: Tensor = self._tower.proj(self._tower.ln_post(pooled))
        return tokens

    def _window_sizes(self, num_mel_frames: int) -> list[int]:
        whole, rest = divmod(int(num_mel_frames), self._window)
        return [self._window] * whole + [rest] * bool(rest)

    def _convolve(self, mels: Sequence[Tensor], sizes_W: Tensor) -> Tensor:
        """Return the windows' rows [W, T, D], zero-padded windows in, padding rows left in."""
        tower = self._tower
        padded = torch.cat([F.pad(mel, (0, -mel.shape[1] % self._window)) for mel in mels], dim=1)
        windows = padded.to(self.dtype).unflatten(1, (-1, self._window)).transpose(0, 1)
        inside = torch.arange(self._window, device=self.device) < sizes_W[:, None]
        hidden = F.gelu(tower.conv1(windows)) * inside[:, None]
        hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)
        positions: Tensor = tower.positional_embedding.positional_embedding[: hidden.shape[1]]
        return hidden + positions.to(hidden.dtype)
