"""Choices left to chance, repeatable for ever: seeded by video and chunk, not by a generator."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from omnisift.layout import Chunks


def draw(chunks: Chunks, lengths: Sequence[int], video_keys: Sequence[str]) -> NDArray[np.float64]:
    """Draw a uniform number in [0, 1) for each token [L] of sequences laid end to end.

    The numbers of a chunk (first grid, second grid, audio) are the bytes of
    SHAKE-256("<video key>/<index of the chunk in its video>"), eight each: they depend neither on
    the device, nor on a library's version, nor on the text around the video or the other videos.
    Tokens outside of all chunks get 0. Raises ValueError unless each sequence has its key.
    """
    if len(video_keys) != len(lengths):
        raise ValueError(
            f"chance is seeded by the video: {len(lengths)} sequences need as many video_keys, "
            f"got {len(video_keys)}"
        )
    drawn = np.zeros(sum(lengths))
    sequence = chunks.sequences(lengths)
    number = np.arange(len(sequence)) - np.searchsorted(sequence, sequence)
    for row in range(len(sequence)):
        members = np.concatenate(
            [
                chunks.first[row, : chunks.num_first[row]],
                chunks.second[row, : chunks.num_second[row]],
                chunks.audio[row, : chunks.num_audio[row]],
            ]
        )
        seed = f"{video_keys[sequence[row]]}/{number[row]}"
        digest = hashlib.shake_256(seed.encode()).digest(8 * len(members))
        # 53 bits are what a float64 holds exactly
        drawn[members] = (np.frombuffer(digest, "<u8") >> 11) / 2.0**53
    return drawn
