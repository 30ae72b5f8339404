"""Where each token sits: the interleaved audio-video block, its 3-D positions, its chunks.

Everything here is integer arithmetic on the host: the layout of a video is known before any
tower has run, so nothing on a GPU has to be waited for to find it.

Shapes: L tokens of a sequence, G grids, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Modality(IntEnum):
    """What a token of the block stands for."""

    TEXT = 0  # the block's own begin and end marks
    VIDEO = 1
    AUDIO = 2


@dataclass(frozen=True)
class ModelLayout:
    """The token ids and rates of a model family; defaults are Qwen2.5-Omni's."""

    video_token_id: int = 151656
    audio_token_id: int = 151646
    vision_bos_id: int = 151652
    vision_eos_id: int = 151653
    audio_bos_id: int = 151647
    audio_eos_id: int = 151648
    positions_per_second: int = 25
    seconds_per_chunk: float = 2.0  # of the interleaving

    @property
    def positions_per_chunk(self) -> int:
        """Return how far apart the chunks of the interleaving begin."""
        return int(self.positions_per_second * self.seconds_per_chunk)

    @classmethod
    def of(cls, thinker_config: Any) -> "ModelLayout":
        """Read ids and rates from a transformers Qwen2.5-Omni thinker configuration."""
        return cls(
            video_token_id=thinker_config.video_token_id,
            audio_token_id=thinker_config.audio_token_id,
            vision_bos_id=thinker_config.vision_start_token_id,
            vision_eos_id=thinker_config.vision_end_token_id,
            audio_bos_id=thinker_config.audio_start_token_id,
            audio_eos_id=thinker_config.audio_end_token_id,
            positions_per_second=thinker_config.position_id_per_seconds,
            seconds_per_chunk=thinker_config.seconds_per_chunk,
        )


@dataclass(frozen=True)
class Block:
    """The audio-video part of a prompt, positions relative to its first token."""

    ids: Integers  # [L]
    positions: Integers  # [3, L]: time, height, width
    modality: NDArray[np.uint8]  # [L]
    next_position: int  # where the text behind the block continues


def num_audio_tokens(num_mel_frames: int) -> int:
    """Return how many tokens the audio tower makes of that many mel frames (25 a second)."""
    return max(0, ((num_mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


def _interleaving_chunk(times: Integers, positions_per_chunk: int) -> Integers:
    """Return the interleaving chunk of each token, as the published processor counts them.

    It opens at most one chunk a token: behind a jump of several chunks the next tokens open
    one each. That is chunk(i) = min(chunk(i-1) + 1, time(i) // positions_per_chunk).
    """
    index = np.arange(len(times))
    return index + np.minimum.accumulate(times // positions_per_chunk - index)


def place_block(
    layout: ModelLayout,
    *,
    grids: int,
    height: int,
    width: int,
    seconds_per_grid: float,
    audio_tokens: int,
) -> Block:
    """Lay out a video of `grids` x `height` x `width` tokens with `audio_tokens` of sound.

    With sound: <vision_bos><audio_bos>, per 2 s the video tokens and then the audio tokens,
    <audio_eos><vision_eos>; silent: <vision_bos>, video tokens, <vision_eos>. Equal to
    transformers' `get_rope_index` (both marks of a pair share one position; the end marks
    follow the last piece, not the highest position).
    """
    if min(grids, height, width) < 1 or audio_tokens < 0:
        raise ValueError(
            f"a block needs at least one video token, got {grids} grids of {height}x{width} "
            f"and {audio_tokens} audio tokens"
        )
    # float32, as the published code multiplies
    seconds = np.arange(grids, dtype=np.float32) * np.float32(seconds_per_grid)
    grid_time = (seconds * np.float32(layout.positions_per_second)).astype(np.int64)
    shape = (grids, height, width)
    video = np.stack(
        [
            np.broadcast_to(grid_time[:, None, None], shape).ravel(),
            np.broadcast_to(np.arange(height)[:, None], shape).ravel(),
            np.broadcast_to(np.arange(width), shape).ravel(),
        ]
    )
    audio = np.broadcast_to(np.arange(audio_tokens), (3, audio_tokens))
    media = np.concatenate([video, audio], axis=1)
    modality = np.repeat([Modality.VIDEO, Modality.AUDIO], [video.shape[1], audio_tokens])
    if audio_tokens:
        span = layout.positions_per_chunk
        chunk = np.concatenate(
            [_interleaving_chunk(video[0], span), _interleaving_chunk(audio[0], span)]
        )
        order = np.lexsort((modality, chunk))  # stable: a modality keeps its own order
        media, modality = media[:, order], modality[order]
        last_piece = (chunk[order] == chunk[order[-1]]) & (modality == modality[-1])
    else:
        last_piece = np.ones(len(modality), dtype=bool)
    end = int(media[:, last_piece].max()) + 2  # +1 for the begin marks' position, +1 to follow
    begin_ids = [layout.vision_bos_id] + [layout.audio_bos_id] * bool(audio_tokens)
    end_ids = [layout.audio_eos_id] * bool(audio_tokens) + [layout.vision_eos_id]
    marks = len(begin_ids)
    ids = np.where(modality == Modality.VIDEO, layout.video_token_id, layout.audio_token_id)
    return Block(
        ids=np.concatenate([begin_ids, ids, end_ids]).astype(np.int64),
        positions=np.concatenate(
            [np.zeros((3, marks)), media + 1, np.full((3, marks), end)], axis=1
        ).astype(np.int64),
        modality=np.pad(modality, marks, constant_values=Modality.TEXT).astype(np.uint8),
        next_position=end + 1,
    )


@dataclass(frozen=True)
class Chunks:
    """The chunks of one sequence, or of several laid end to end: indices into its tokens.

    Rows are padded with index 0; the counts say how much of a row is real.
    """

    first: Integers  # [C, N1] tokens of the first grid
    num_first: Integers  # [C]
    second: Integers  # [C, N2] tokens of the second grid; none behind an odd last grid
    num_second: Integers  # [C]
    audio: Integers  # [C, A]
    num_audio: Integers  # [C]

    def sequences(self, lengths: Sequence[int]) -> Integers:
        """Return which of the sequences, `lengths` tokens long, each chunk belongs to, [C]."""
        place: Integers = np.searchsorted(np.cumsum(lengths), self.first[:, :1].ravel(), "right")
        return place


def pad_rows(groups: Integers, members: Integers, num_groups: int) -> tuple[Integers, Integers]:
    """Gather `members` (their group in `groups`) into rows padded with 0; return rows, counts."""
    counts = np.bincount(groups, minlength=num_groups).astype(np.int64)
    width = int(counts.max(initial=0))
    if not _ascending(groups):
        order = np.argsort(groups, kind="stable")
        groups, members = groups[order], members[order]
    if counts.size and (counts == width).all():
        return members.reshape(num_groups, width), counts
    starts = np.cumsum(counts) - counts
    rows = np.zeros((num_groups, width), dtype=np.int64)
    rows[groups, np.arange(len(groups)) - np.repeat(starts, counts)] = members
    return rows, counts


def rows_alike(counts: Integers) -> list[Integers]:
    """Sort rows, of `counts` members, into groups to pad together; a group keeps their order.

    Padded to its longest row, a group is at most twice as large as what its rows hold: all rows
    where that is true of them all, else those of at least half the longest, and so on.
    """
    groups, rest = [], np.arange(len(counts))
    while rest.size:
        longest = counts[rest].max()
        all_fit = rest.size * longest <= 2 * counts[rest].sum()
        together = all_fit | (2 * counts[rest] >= longest)
        groups.append(rest[together])
        rest = rest[~together]
    return groups


def _ascending(values: Integers) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _distinct(values: Integers) -> tuple[Integers, Integers]:
    """Return the distinct values in order and, for each value, its place among them."""
    if not _ascending(values):
        return np.unique(values, return_inverse=True)
    # The usual layout is in order already, and sorting it would cost more than all the rest.
    begins = np.ones(len(values), dtype=bool)
    begins[1:] = values[1:] != values[:-1]
    return values[begins], np.cumsum(begins) - 1


def find_chunks(
    sequences: Sequence[tuple[Integers, Integers]], *, video_token_id: int, audio_token_id: int
) -> Chunks:
    """Find the chunks of sequences given as (ids [L], positions [3, L]) (method.md, 1).

    Chunks are consecutive pairs of distinct video times. A chunk's audio has its time in
    [the chunk's first time, the next chunk's first time); the last window has no end. The
    indices count through the sequences laid end to end.
    """
    # (chunk, token index)
    firsts: list[tuple[Integers, Integers]] = []
    seconds: list[tuple[Integers, Integers]] = []
    audios: list[tuple[Integers, Integers]] = []
    num_chunks = offset = 0
    for ids, positions in sequences:
        video = np.flatnonzero(ids == video_token_id)
        times, grid = _distinct(positions[0, video])
        chunk = (grid >> 1) + num_chunks
        for parts, parity in ((firsts, 0), (seconds, 1)):
            chosen = np.flatnonzero((grid & 1) == parity)
            parts.append((chunk[chosen], video[chosen] + offset))
        audio = np.flatnonzero(ids == audio_token_id)
        window = np.searchsorted(times[::2], positions[0, audio], side="right") - 1
        inside = np.flatnonzero(window >= 0)
        audios.append((window[inside] + num_chunks, audio[inside] + offset))
        num_chunks += (len(times) + 1) // 2
        offset += len(ids)

    def gather(parts: list[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
        groups, members = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        return pad_rows(groups, members, num_chunks)

    return Chunks(*gather(firsts), *gather(seconds), *gather(audios))


@dataclass(frozen=True)
class Grids:
    """The grids of one sequence, in the order of their times."""

    index: Integers  # [G, N] index in the sequence; rows are padded with 0
    num: Integers  # [G] how much of a row is real
    time: Integers  # [G]


def find_grids(ids: Integers, positions: Integers, *, video_token_id: int) -> Grids:
    """Find the grids of a sequence given as ids [L] and positions [3, L]."""
    video = np.flatnonzero(ids == video_token_id)
    times, grid = np.unique(positions[0, video], return_inverse=True)
    return Grids(*pad_rows(grid, video, len(times)), times)
