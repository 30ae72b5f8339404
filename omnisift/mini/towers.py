"""The towers over a batch of equal clips, with gradients: what training needs of them.

The same products as the stock forward (held against it by a test), but windows of all clips are
rows of one batch. It presumes what the small model has: windows of 2x2 tokens that fill the frame
and no block over the whole of it.

Shapes: B clips, G grids, n windows of a side, D width, d width of a head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisift.backbone import inner
from omnisift.media import FACTOR, MERGE, PATCH, TEMPORAL_PATCH, normalise
from omnisift.mini.fused import fused
from omnisift.mini.layers import GatedLayer, Linear, linear, rms_norm, rotate, split_heads

_WINDOW = 2  # tokens of a window's side


def _windows(frames: Tensor) -> Tensor:
    """Cut normalised frames [B, T, 3, H, W] into patches, [B * G * n * n, 16, 3 * 2 * 14 * 14]."""
    batch, num_frames, channels, height, width = frames.shape
    rows, columns = height // (FACTOR * _WINDOW), width // (FACTOR * _WINDOW)
    split = frames.view(
        *(batch, num_frames // TEMPORAL_PATCH, TEMPORAL_PATCH, channels),
        *(rows, _WINDOW, MERGE, PATCH),
        *(columns, _WINDOW, MERGE, PATCH),
    )
    # -> clip, grid, window, token in it, patch in that; channel, frame, y, x
    patches = split.permute(0, 1, 4, 8, 5, 9, 6, 10, 3, 2, 7, 11)
    return patches.reshape(-1, (_WINDOW * MERGE) ** 2, channels * TEMPORAL_PATCH * PATCH**2)


def _rotation(visual: Any, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the patches, [n * n, 1, 16, d]."""
    head = visual.blocks[0].attn.dim // visual.blocks[0].attn.num_heads
    side = _WINDOW * MERGE
    y, x = torch.meshgrid(
        torch.arange(rows * side, device=device),
        torch.arange(columns * side, device=device),
        indexing="ij",
    )
    place = torch.stack((y, x), dim=-1)
    place = place.view(rows, _WINDOW, MERGE, columns, _WINDOW, MERGE, 2)
    place = place.permute(0, 3, 1, 4, 2, 5, 6).reshape(rows * columns, side**2, 2)
    frequency = 10_000.0 ** -(torch.arange(0, head // 2, 2, device=device) / (head // 2))
    angle = (place[..., None].float() * frequency).flatten(-2)
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos(), angle.sin()


@fused
def vision_block(x: Tensor, w: GatedLayer, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Run a block of the vision tower on windows [N, 16, D]."""
    h = rms_norm(x, w.norm1, w.eps)
    query, key = (
        rotate(split_heads(F.linear(h, *w_qk), num_heads), cos, sin) for w_qk in (w.q, w.k)
    )
    value = split_heads(F.linear(h, *w.v), num_heads)
    attended = F.scaled_dot_product_attention(query, key, value)
    return w.finish(x, attended)


def encode_frames(model: Any, frames: Tensor) -> Tensor:
    """Return the video tokens [B, G, rows * columns, D] of frames in [0, 1], [B, T, 3, H, W]."""
    visual = inner(model).visual
    batch, num_frames, _, height, width = frames.shape
    rows, columns = height // (FACTOR * _WINDOW), width // (FACTOR * _WINDOW)
    patches = _windows(normalise(frames))
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = _rotation(visual, rows, columns, frames.device)
    repeats = x.shape[0] // (rows * columns)
    cos, sin = cos.repeat(repeats, 1, 1, 1).to(x.dtype), sin.repeat(repeats, 1, 1, 1).to(x.dtype)
    for block in visual.blocks:
        x = vision_block(x, GatedLayer.of_vision(block), cos, sin, block.attn.num_heads)
    merged: Tensor = visual.merger(x.reshape(-1, x.shape[-1]))
    grids = num_frames // TEMPORAL_PATCH
    tokens = merged.view(batch, grids, rows, columns, _WINDOW, _WINDOW, -1)
    return tokens.transpose(3, 4).reshape(batch, grids, rows * columns * _WINDOW**2, -1)


class AudioLayer(NamedTuple):
    """The weights of a layer of the audio tower."""

    norm1: Linear
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm2: Linear
    up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: Any) -> "AudioLayer":
        """Take them from transformers' module."""
        attn = layer.self_attn
        return cls(
            *(
                linear(part)
                for part in (
                    *(layer.self_attn_layer_norm, attn.q_proj, attn.k_proj, attn.v_proj),
                    *(attn.out_proj, layer.final_layer_norm, layer.fc1, layer.fc2),
                )
            )
        )


def audio_layer(x: Tensor, w: AudioLayer, num_heads: int) -> Tensor:
    """Run a layer of the audio tower on windows [N, frames, D]."""
    h = F.layer_norm(x, x.shape[-1:], *w.norm1)
    query, key, value = (split_heads(F.linear(h, *part), num_heads) for part in (w.q, w.k, w.v))
    attended = F.scaled_dot_product_attention(query, key, value)
    x = x + F.linear(attended.transpose(1, 2).flatten(2), *w.out)
    h = F.layer_norm(x, x.shape[-1:], *w.norm2)
    return x + F.linear(F.gelu(F.linear(h, *w.up)), *w.down)


_fused_audio_layer = fused(audio_layer)


def _encode_windows(
    tower: Any, mel: Tensor, size: int, run_layer: Callable[[Tensor, AudioLayer, int], Tensor]
) -> Tensor:
    """Return the rows [B, T, D] of a spectrogram [B, 128, F] that windows of a size fill."""
    batch, bins, _ = mel.shape
    windows = mel.unflatten(-1, (-1, size)).transpose(1, 2)
    x = F.gelu(tower.conv1(windows.reshape(-1, bins, size)))
    x = F.gelu(tower.conv2(x)).transpose(1, 2)
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    for layer in tower.layers:
        x = run_layer(x, AudioLayer.of(layer), layer.self_attn.num_heads)
    return x.reshape(batch, -1, x.shape[-1])


def encode_mel(model: Any, mel: Tensor) -> Tensor:
    """Return the audio tokens [B, A, D] of a log-mel spectrogram [B, 128, F]."""
    tower = inner(model).audio_tower
    window = 2 * tower.n_window
    rest = mel.shape[-1] % window
    whole = mel.shape[-1] - rest
    x = _encode_windows(tower, mel[..., :whole], window, _fused_audio_layer)
    if rest:
        # One short window a clip, in many shapes: not worth compiling.
        x = torch.cat([x, _encode_windows(tower, mel[..., whole:], rest, audio_layer)], dim=1)
    pooled = (x[:, 0:-1:2] + x[:, 1::2]) / 2  # an odd last row makes no token
    tokens: Tensor = tower.proj(tower.ln_post(pooled))
    return tokens
