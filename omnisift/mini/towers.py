"""The towers over a batch of equal clips, with gradients: what training needs of them.

The same products as the stock forward (held against it by a test), but windows of all clips are
rows of one batch. It presumes what the small model has: windows of 2x2 tokens that fill the frame
and no block over the whole of it, sound that fills the audio windows.

Shapes: B clips, G grids, n windows of a side, D width, d width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisift.backbone import inner
from omnisift.media import FACTOR, MERGE, PATCH, TEMPORAL_PATCH, normalise

_WINDOW = 2  # tokens of a window's side


def _windows(frames: Tensor) -> Tensor:
    """Cut normalised frames [B, 3, T, H, W] into patches, [B * G * n * n, 16, 3 * 2 * 14 * 14]."""
    batch, channels, num_frames, height, width = frames.shape
    rows, columns = height // (FACTOR * _WINDOW), width // (FACTOR * _WINDOW)
    split = frames.view(
        *(batch, channels, num_frames // TEMPORAL_PATCH, TEMPORAL_PATCH),
        *(rows, _WINDOW, MERGE, PATCH),
        *(columns, _WINDOW, MERGE, PATCH),
    )
    # -> clip, grid, window, token in it, patch in that; channel, frame, y, x
    patches = split.permute(0, 2, 4, 8, 5, 9, 6, 10, 1, 3, 7, 11)
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def vision_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run a block of the vision tower on windows [N, 16, D]."""
    attention = block.attn

    def heads(value: Tensor) -> Tensor:
        return value.view(*value.shape[:2], attention.num_heads, -1).transpose(1, 2)

    h = block.norm1(x)
    query, key = (_rotate(heads(layer(h)), cos, sin) for layer in (attention.q, attention.k))
    attended = F.scaled_dot_product_attention(query, key, heads(attention.v(h)))
    x = x + attention.proj(attended.transpose(1, 2).flatten(2))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def encode_frames(model: Any, frames: Tensor) -> Tensor:
    """Return the video tokens [B, G, rows * columns, D] of frames in [0, 1], [B, 3, T, H, W]."""
    visual = inner(model).visual
    batch, _, num_frames, height, width = frames.shape
    rows, columns = height // (FACTOR * _WINDOW), width // (FACTOR * _WINDOW)
    patches = _windows(normalise(frames))
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = _rotation(visual, rows, columns, frames.device)
    repeats = x.shape[0] // (rows * columns)
    cos, sin = cos.repeat(repeats, 1, 1, 1).to(x.dtype), sin.repeat(repeats, 1, 1, 1).to(x.dtype)
    for block in visual.blocks:
        x = vision_block(block, x, cos, sin)
    merged = visual.merger(x.reshape(-1, x.shape[-1]))
    grids = num_frames // TEMPORAL_PATCH
    tokens = merged.view(batch, grids, rows, columns, _WINDOW, _WINDOW, -1)
    return tokens.transpose(3, 4).reshape(batch, grids, rows * columns * _WINDOW**2, -1)


def audio_layer(layer: Any, x: Tensor) -> Tensor:
    """Run a layer of the audio tower on windows [N, frames, D]."""
    attention = layer.self_attn

    def heads(value: Tensor) -> Tensor:
        return value.view(*value.shape[:2], attention.num_heads, -1).transpose(1, 2)

    h = layer.self_attn_layer_norm(x)
    attended = F.scaled_dot_product_attention(
        heads(attention.q_proj(h)), heads(attention.k_proj(h)), heads(attention.v_proj(h))
    )
    x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
    h = layer.fc1(layer.final_layer_norm(x))
    out: Tensor = x + layer.fc2(layer.activation_fn(h))
    return out


def encode_mel(model: Any, mel: Tensor) -> Tensor:
    """Return the audio tokens [B, F / 4, D] of a log-mel spectrogram [B, 128, F]."""
    tower = inner(model).audio_tower
    batch, bins, num_frames = mel.shape
    window = 2 * tower.n_window
    windows = mel.view(batch, bins, num_frames // window, window).transpose(1, 2)
    x = F.gelu(tower.conv1(windows.reshape(-1, bins, window)))
    x = F.gelu(tower.conv2(x)).transpose(1, 2)
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    for layer in tower.layers:
        x = audio_layer(layer, x)
    pooled = (x[:, 0::2] + x[:, 1::2]) / 2
    tokens: Tensor = tower.proj(tower.ln_post(pooled))
    return tokens.view(batch, num_frames // 4, -1)
