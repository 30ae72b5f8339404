"""What compression knows before any tower has run: which tokens are compared, how many survive.

All of it is integer arithmetic on the host, copied to the device once. Made while the towers are
busy it costs no time at all.

Shapes: L tokens of a sequence, C chunks, N tokens of a grid, A audio tokens, R chunks whose audio
is selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisift.chance import draw
from omnisift.layout import ModelLayout, find_chunks, rows_alike
from omnisift.transfer import upload


@dataclass(frozen=True)
class DropShares:
    """The share of tokens REMOVED, per modality, each in [0, 1]."""

    video: float
    audio: float


@dataclass(frozen=True)
class Deciders:
    """What decides which tokens go. The default is the method, all else are its ablations.

    An ablation drops exactly as many tokens of each chunk as the method; those it has no score
    for go by chance. It needs a selector that was trained with it.
    """

    spatial: bool = True  # False: first grids by chance
    temporal: bool = True  # False: second grids by chance
    audio: Literal["video", "audio", "chance"] = "video"  # the context of the selector, or none

    @property
    def by_chance(self) -> bool:
        """Return whether anything is left to chance."""
        return not (self.spatial and self.temporal) or self.audio == "chance"


COMPLETE = Deciders()


class VideoPlan(NamedTuple):
    """The grids to prune, on the device. Rows are padded with token 0."""

    first: Tensor  # [C, N1] tokens of the first grid, through all sequences laid end to end
    num_first: Tensor  # [C]
    drop_first: Tensor  # [C]
    second: Tensor  # [C, N2]
    num_second: Tensor  # [C]
    drop_second: Tensor  # [C]


class AudioPlan(NamedTuple):
    """Chunks with about as much audio each, from which some is selected; on the device."""

    chunk: Tensor  # [R] their numbers
    num_context: Tensor  # [R] surviving video tokens; they are the context
    longest_context: int
    audio: Tensor  # [R, A]
    num_audio: Tensor  # [R]
    keep_audio: Tensor  # [R]


@dataclass(frozen=True)
class CompressionPlan:
    """The compression of several sequences, but for their scores."""

    shares: DropShares
    deciders: Deciders
    chance: Tensor | None  # [L] drawn for each token, where a decider is chance
    lengths: tuple[int, ...]  # tokens of each sequence
    kept: tuple[int, ...]  # tokens that survive of each sequence
    video: VideoPlan
    audio: tuple[AudioPlan, ...]  # one, but of unlike windows several; none: nothing to select


def plan_compression(
    sequences: Sequence[tuple[Tensor, Tensor]],
    shares: DropShares,
    layout: ModelLayout,
    *,
    device: torch.device,
    deciders: Deciders = COMPLETE,
    video_keys: Sequence[str] = (),
) -> CompressionPlan:
    """Plan for sequences given as (ids [L], positions [3, L]), best on the CPU (method.md, 1-3).

    `video_keys`, one a sequence, seed what `deciders` leaves to chance.
    """
    arrays = [(ids.cpu().numpy(), positions.cpu().numpy()) for ids, positions in sequences]
    chunks = find_chunks(
        arrays, video_token_id=layout.video_token_id, audio_token_id=layout.audio_token_id
    )
    drop_first = (chunks.num_first * shares.video).astype(np.int64)
    # Only equal grids can be compared token by token; an unequal second grid stays whole.
    drop_second = np.where(chunks.num_second == chunks.num_first, drop_first, 0)
    context = chunks.num_first + chunks.num_second - drop_first - drop_second
    has_context = (context > 0) | (deciders.audio == "audio")
    selects = has_context & (chunks.num_audio > 1)
    drop_audio = np.where(selects, (chunks.num_audio * shares.audio).astype(np.int64), 0)
    arrays_of_video = [chunks.first, chunks.num_first, drop_first]
    arrays_of_video += [chunks.second, chunks.num_second, drop_second]
    # One window may hold minutes of sound (a clip's last has no end) beside many of two seconds.
    selected = np.flatnonzero(selects)
    groups = [selected[alike] for alike in rows_alike(chunks.num_audio[selected])]
    arrays_of_audio = [
        array
        for rows in groups
        for array in (
            *(rows, context[rows], chunks.audio[rows, : chunks.num_audio[rows].max()]),
            *(chunks.num_audio[rows], (chunks.num_audio - drop_audio)[rows]),
        )
    ]
    on_device = iter(upload(arrays_of_video + arrays_of_audio, device))
    video, audio = VideoPlan(*islice(on_device, 6)), []
    for rows in groups:
        chosen, num_context, *rest = islice(on_device, 5)
        audio.append(AudioPlan(chosen, num_context, int(context[rows].max()), *rest))
    lengths = [len(ids) for ids, _ in arrays]
    dropped = np.bincount(
        chunks.sequences(lengths),
        weights=drop_first + drop_second + drop_audio,
        minlength=len(lengths),
    )
    chance = None
    if deciders.by_chance:
        chance = torch.from_numpy(draw(chunks, lengths, video_keys)).to(device)
    return CompressionPlan(
        shares=shares,
        deciders=deciders,
        chance=chance,
        lengths=tuple(lengths),
        kept=tuple(length - int(num) for length, num in zip(lengths, dropped, strict=True)),
        video=video,
        audio=tuple(audio),
    )
