"""How clips of the world lie before the LLM, and which share of a chunk is kept.

Shapes: B scenes, G grids, N tokens of a grid, A audio tokens, L tokens of the block, D width.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisift.compress import drop_shares
from omnisift.compression_plan import DropShares
from omnisift.layout import Block, Modality, ModelLayout, place_block
from omnisift.media import FACTOR
from omnisift.mini.lessons import Slots
from omnisift.mini.observe import FPS
from omnisift.mini.sounds import TOKENS_PER_SECOND
from omnisift.mini.world import SIDE

_SIDE_TOKENS = SIDE // FACTOR


def shares_for(retain: float) -> DropShares:
    """Return drop shares that keep `retain` of all tokens of this model's chunks: 128 + 50.

    Video loses what the published setting of that name has it lose, .67 at 35 % and .77 at 25 %;
    audio the rest. The published shares of audio are those of a model with four times as many
    video tokens: here they would keep 42 and 30 % of all.
    """
    if retain >= 1:
        return DropShares(video=0.0, audio=0.0)
    video, audio = _SIDE_TOKENS**2, 2 * TOKENS_PER_SECOND
    shares = drop_shares(retain)
    left = round(retain * (2 * video + audio)) - 2 * (video - int(video * shares.video))
    dropped = audio - min(max(left, 0), audio)
    # Half a token more, so that the product with the share rounds down to this many.
    return DropShares(video=shares.video, audio=min(1.0, (dropped + 0.5) / audio))


class Clips(NamedTuple):
    """The layout of clips of one length and as much sound, on the device."""

    block: Block
    ids: Tensor  # [L]
    positions: Tensor  # [3, L]
    video: Tensor  # places in the block
    audio: Tensor


def lay_out(layout: ModelLayout, duration_s: int, audio_tokens: int, device: torch.device) -> Clips:
    """Lay out clips of the world."""
    block = place_block(
        layout,
        grids=duration_s * FPS // 2,
        height=_SIDE_TOKENS,
        width=_SIDE_TOKENS,
        seconds_per_grid=2 / FPS,
        audio_tokens=audio_tokens,
    )
    video, audio = (
        np.flatnonzero(block.modality == kind) for kind in (Modality.VIDEO, Modality.AUDIO)
    )
    on_device = (
        torch.from_numpy(value).to(device) for value in (block.ids, block.positions, video, audio)
    )
    return Clips(block, *on_device)


def place(model: Any, clips: Clips, video: Tensor, audio: Tensor) -> Tensor:
    """Return the block's embeddings [B, L, D] from video [B, G, N, D] and audio [B, A, D]."""
    embeds: Tensor = model.get_input_embeddings()(clips.ids).expand(len(video), -1, -1)
    embeds = embeds.index_copy(1, clips.video, video.flatten(1, 2).to(embeds.dtype))
    return embeds.index_copy(1, clips.audio, audio.to(embeds.dtype))


def slot_mask(num_context: int, slots: Slots, device: torch.device) -> Tensor:
    """Return who sees whom, bool [1, 1, L, L]: the context, and what came before in the slot."""
    lengths = torch.tensor([num_context, *slots.lengths])
    slot = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    index = torch.arange(len(slot))
    same = (slot[:, None] == slot) | (slot == 0)
    return (same & (index[:, None] >= index))[None, None].to(device)
