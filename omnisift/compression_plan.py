"""What compression knows before any tower has run: which tokens are compared, how many survive.

All of it is integer arithmetic on the host, copied to the device once. Made while the towers are
busy it costs no time at all.

Shapes: L tokens of a sequence, C chunks, N tokens of a grid, A audio tokens, R chunks whose audio
is selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisift.layout import find_chunks
from omnisift.transfer import upload


@dataclass(frozen=True)
class DropShares:
    """The share of tokens REMOVED, per modality, each in [0, 1]."""

    video: float
    audio: float

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1]."""
        for name, share in (("video_drop", self.video), ("audio_drop", self.audio)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")


class VideoPlan(NamedTuple):
    """The grids to prune, on the device. Rows are padded with token 0."""

    first: Tensor  # [C, N1] tokens of the first grid, through all sequences laid end to end
    num_first: Tensor  # [C]
    drop_first: Tensor  # [C]
    second: Tensor  # [C, N2]
    num_second: Tensor  # [C]
    drop_second: Tensor  # [C]


class AudioPlan(NamedTuple):
    """The chunks whose audio is selected, on the device."""

    chunk: Tensor  # [R] their numbers
    num_context: Tensor  # [R] surviving video tokens
    longest_context: int
    audio: Tensor  # [R, A]
    num_audio: Tensor  # [R]
    keep_audio: Tensor  # [R]


@dataclass(frozen=True)
class CompressionPlan:
    """The compression of several sequences, but for their scores."""

    shares: DropShares
    positions: tuple[Tensor, ...]  # [3, L] of each sequence, as given
    kept: tuple[int, ...]  # tokens that survive of each sequence
    video: VideoPlan
    audio: AudioPlan | None  # None: no chunk has audio to select from

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each sequence."""
        return [positions.shape[1] for positions in self.positions]


def plan_compression(
    layouts: Sequence[tuple[Tensor, Tensor]],
    shares: DropShares,
    *,
    video_token_id: int,
    audio_token_id: int,
    device: torch.device,
) -> CompressionPlan:
    """Plan for sequences given as (ids [L], positions [3, L]), best on the CPU (method.md, 1-3)."""
    arrays = [(ids.cpu().numpy(), positions.cpu().numpy()) for ids, positions in layouts]
    chunks = find_chunks(arrays, video_token_id=video_token_id, audio_token_id=audio_token_id)
    drop_first = (chunks.num_first * shares.video).astype(np.int64)
    # Only equal grids can be compared token by token; an unequal second grid stays whole.
    drop_second = np.where(chunks.num_second == chunks.num_first, drop_first, 0)
    context = chunks.num_first + chunks.num_second - drop_first - drop_second
    selects = (context > 0) & (chunks.num_audio > 1)
    drop_audio = np.where(selects, (chunks.num_audio * shares.audio).astype(np.int64), 0)
    rows = np.flatnonzero(selects)
    on_device = upload(
        [
            *(chunks.first, chunks.num_first, drop_first),
            *(chunks.second, chunks.num_second, drop_second),
            *(rows, context[rows], chunks.audio[rows], chunks.num_audio[rows]),
            (chunks.num_audio - drop_audio)[rows],
        ],
        device,
    )
    audio = None
    if rows.size:
        chosen, num_context, *rest = on_device[6:]
        audio = AudioPlan(chosen, num_context, int(context[rows].max()), *rest)
    lengths = np.array([len(ids) for ids, _ in arrays])
    # A chunk belongs to the sequence that its first token is in.
    owner = np.searchsorted(np.cumsum(lengths), chunks.first[:, :1].ravel(), side="right")
    dropped = np.zeros(len(lengths), dtype=np.int64)
    np.add.at(dropped, owner, drop_first + drop_second + drop_audio)
    return CompressionPlan(
        shares=shares,
        positions=tuple(positions for _, positions in layouts),
        kept=tuple((lengths - dropped).tolist()),
        video=VideoPlan(*on_device[:6]),
        audio=audio,
    )
