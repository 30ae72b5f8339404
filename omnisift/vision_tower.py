"""Qwen2.5-Omni's vision tower over many grids at once, from the stock modules' weights.

Equal to the stock forward within rounding; what differs is how it runs. All windows of a block
are one attention call, projections of one input are one product, the MLP's width is padded to a
multiple of 64 (of 3420 cuBLAS makes 15.4 ms a layer, of 3456 6.4 ms; exact, silu(0) * 0 = 0),
blocks are compiled on a GPU. No attention crosses grids, so a long video runs in slices and
memory does not grow with it.

Shapes: P patches, N tokens (4 patches), H heads, d width of a head, D width.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from omnisift.media import FACTOR, MERGE, PATCH, TEMPORAL_PATCH, patchify
from omnisift.segments import Segments, attend, has_varlen, make_segments, pack_linears
from omnisift.transfer import upload, upload_media

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # columns, for the fast matrix kernels
MAX_PATCHES = 65_536  # of a slice; twice as many gain 2 %


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x_PHd: Tensor, cos_Pd: Tensor, sin_Pd: Tensor) -> Tensor:
    wide = x_PHd.float()
    left, right = wide.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (wide * cos_Pd[:, None] + turned * sin_Pd[:, None]).to(x_PHd.dtype)


class _Block(nn.Module):
    """One block of the tower, its weights packed."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.norm1, self.norm2 = block.norm1.weight, block.norm2.weight
        self.eps: float = block.norm1.variance_epsilon
        self.num_heads: int = attention.num_heads
        self.act = mlp.act_fn
        width = mlp.gate_proj.out_features
        padded = -(-width // _ALIGNMENT) * _ALIGNMENT
        packed = pack_linears((attention.q, attention.k, attention.v), rows=attention.dim)
        self.qkv_weight, self.qkv_bias = map(_frozen, packed)
        packed = pack_linears((mlp.gate_proj, mlp.up_proj), rows=padded)
        self.gate_up_weight, self.gate_up_bias = map(_frozen, packed)
        down = mlp.down_proj.weight.new_zeros(mlp.down_proj.out_features, padded)
        mlp.down_proj.weight.data = down[:, :width].copy_(mlp.down_proj.weight.data)
        self.down_weight, self.down_bias = _frozen(down), mlp.down_proj.bias
        self.proj = attention.proj

    def forward(self, x_PD: Tensor, cos_Pd: Tensor, sin_Pd: Tensor, segments: Segments) -> Tensor:
        normed = _rms_norm(x_PD, self.norm1, self.eps)
        projected = F.linear(normed, self.qkv_weight, self.qkv_bias)
        query, key, value = projected.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        attended = attend(
            _rotate(query, cos_Pd, sin_Pd), _rotate(key, cos_Pd, sin_Pd), value, segments
        )
        x_PD = x_PD + self.proj(attended.flatten(1))
        normed = _rms_norm(x_PD, self.norm2, self.eps)
        gate, up = F.linear(normed, self.gate_up_weight, self.gate_up_bias).chunk(2, dim=-1)
        return x_PD + F.linear(self.act(gate) * up, self.down_weight, self.down_bias)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


@cache
def _window_order(
    height: int, width: int, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a grid's tokens [N] sorted by window, and the windows' sizes in tokens."""
    row, column = np.divmod(np.arange(height * width), width)
    windows = row // window * -(-width // window) + column // window
    return np.argsort(windows, kind="stable"), np.bincount(windows)


class VisionTower:
    """Encode clips with the packed weights of a stock tower."""

    def __init__(self, tower: Any) -> None:
        """Pack `tower` (a transformers `Qwen2_5OmniVisionEncoder`); it stays usable."""
        self.device: torch.device = tower.patch_embed.proj.weight.device
        self.dtype: torch.dtype = tower.patch_embed.proj.weight.dtype
        attention = tower.blocks[0].attn
        self.varlen = has_varlen(self.device, self.dtype, attention.dim // attention.num_heads)
        self.compiled = self.device.type == "cuda"
        self._full = frozenset(tower.fullatt_block_indexes)
        self._window = tower.window_size // FACTOR
        self._embed = tower.patch_embed.proj.weight.flatten(1)
        self._frequencies = tower.rotary_pos_emb.inv_freq.float()
        self._merger = tower.merger
        self._blocks = [_Block(block) for block in tower.blocks]
        if self.compiled:
            for block in self._blocks:  # one graph serves them all
                block.compile(dynamic=True)
        log.info(
            "vision tower packed: %d blocks, %s attention, %s",
            len(self._blocks),
            "varlen" if self.varlen else "batched",
            "compiled" if self.compiled else "eager",
        )

    @property
    def bytes_per_patch(self) -> int:
        """Return the working memory that a patch of a slice takes, at its most (in the MLP)."""
        mlp = self._blocks[0].gate_up_weight
        # residual and norm, gate and up, their product; two rotary tables in float32
        rotary = 2 * 4 * len(self._frequencies)
        return self.dtype.itemsize * (2 * mlp.shape[1] + 3 * mlp.shape[0] // 2) + 4 * rotary

    def __call__(self, clips: Sequence[Tensor], *, max_patches: int = MAX_PATCHES) -> list[Tensor]:
        """Return the tokens [N, D] of each clip uint8 [T, H, W, 3], on the tower's device.

        `max_patches` bounds the working memory: a slice of that many runs at once, or one grid
        if that is more.
        """
        counts = [
            -(-clip.shape[0] // TEMPORAL_PATCH)
            * (clip.shape[1] // FACTOR)
            * (clip.shape[2] // FACTOR)
            for clip in clips
        ]
        out_features = self._merger.mlp[-1].out_features
        tokens = torch.empty(sum(counts), out_features, device=self.device, dtype=self.dtype)
        start = 0
        for pieces in _slices(clips, max_patches):
            start += self._encode(pieces, tokens[start:])
        return list(tokens.split(counts))

    def _encode(self, pieces: Sequence[Tensor], out_ND: Tensor) -> int:
        """Encode frames that fit the memory into the first rows of `out_ND`; return how many."""
        x_PD, grids = self._embed_patches(pieces)
        order, frames, windows, cos_Pd, sin_Pd = self._lay_out(grids)
        x_PD = x_PD.view(len(order), -1)[order].view(len(x_PD), -1)
        for number, block in enumerate(self._blocks):
            x_PD = block(x_PD, cos_Pd, sin_Pd, frames if number in self._full else windows)
        out_ND[order] = self._merger(x_PD)
        return len(order)

    def _embed_patches(
        self, pieces: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[tuple[int, int, int]]]:
        embedded, grids = [], []
        for piece in pieces:
            patches, grid = patchify(upload_media(piece, self.device))
            embedded.append(F.linear(patches.to(self.dtype), self._embed))
            grids.append(grid)
        return torch.cat(embedded), grids

    def _lay_out(
        self, grids: Sequence[tuple[int, int, int]]
    ) -> tuple[Tensor, Segments, Segments, Tensor, Tensor]:
        """Return token order, frames, windows and rotary tables for grids of patches (t, h, w)."""
        orders, rows, frames, windows, offset = [], [], [], [], 0
        for num_grids, height, width in grids:
            order, sizes = _window_order(height // MERGE, width // MERGE, self._window)
            tokens = len(order)
            orders.append((order + np.arange(num_grids)[:, None] * tokens).ravel() + offset)
            place = np.stack(np.divmod(order, width // MERGE), axis=1) * MERGE
            patch = np.stack(np.divmod(np.arange(MERGE**2), MERGE), axis=1)
            rows.append(np.tile((place[:, None] + patch).reshape(-1, 2), (num_grids, 1)))
            frames.append(np.full(num_grids, height * width))
            windows.append(np.tile(sizes * MERGE**2, num_grids))
            offset += num_grids * tokens
        order_N, place_P2 = upload([np.concatenate(orders), np.concatenate(rows)], self.device)
        angles = (place_P2[..., None] * self._frequencies).flatten(1)
        angles = torch.cat((angles, angles), dim=-1)
        return (
            order_N,
            make_segments(np.concatenate(frames), self.device, varlen=self.varlen),
            make_segments(np.concatenate(windows), self.device, varlen=self.varlen),
            angles.cos(),
            angles.sin(),
        )


def _slices(clips: Sequence[Tensor], max_patches: int) -> Iterator[list[Tensor]]:
    """Cut clips at grid boundaries and gather the pieces into slices of at most `max_patches`."""
    pieces: list[Tensor] = []
    room = max_patches
    for clip in clips:
        patches = (clip.shape[1] // PATCH) * (clip.shape[2] // PATCH)  # of a grid
        start = 0
        while start < clip.shape[0]:
            num_grids = max(room // patches, 0 if pieces else 1)
            if num_grids == 0:
                yield pieces
                pieces, room = [], max_patches
                continue
            piece = clip[start : start + num_grids * TEMPORAL_PATCH]
            pieces.append(piece)
            start += piece.shape[0]
            room -= -(-piece.shape[0] // TEMPORAL_PATCH) * patches
    if pieces:
        yield pieces
