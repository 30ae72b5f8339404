"""How much memory a batch of clips takes beyond the weights, from shapes alone: which fit together?

Checked against the allocator's peaks on a GPU (docs/results.md).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from omnisift.media import FACTOR, MERGE, TEMPORAL_PATCH
from omnisift.vision_tower import MAX_PATCHES

_FIXED_BYTES = 128 << 20  # workspaces of the matrix products
_WHOLE_COPIES = 2  # of all embeddings: placed, and laid end to end
_FRAME_BYTES = 3 * FACTOR**2 * TEMPORAL_PATCH  # of a token


class ClipSize(NamedTuple):
    """What a clip consists of, in tokens."""

    grids: int
    height: int
    width: int
    audio: int

    @property
    def video(self) -> int:
        """Return the number of video tokens."""
        return self.grids * self.height * self.width


@dataclass(frozen=True)
class MemoryBudget:
    """What a batch takes on one model with one method, and what it may take."""

    limit_bytes: int
    bytes_per_patch: int  # of a slice of the vision tower
    bytes_per_token: int  # of an embedding
    copies: int  # of all embeddings, alive at once while they are compressed; two at least
    kept: float  # share of the tokens that survive at most (methods.most_kept)

    @property
    def max_patches(self) -> int:
        """Return how large a slice of the vision tower may be.

        A third of the memory at most, which leaves room for the tokens; small ones are slower.
        """
        return min(MAX_PATCHES, self.limit_bytes // 3 // self.bytes_per_patch)

    def needed(self, clips: Sequence[ClipSize]) -> int:
        """Return the bytes that a batch takes at its most.

        The batch before it may be unfinished: its frames and its kept tokens are counted, as
        many as this batch has.
        """
        video = sum(clip.video for clip in clips)
        tokens = (video + sum(clip.audio for clip in clips)) * self.bytes_per_token
        largest_grid = max(clip.height * clip.width for clip in clips) * MERGE**2
        in_slice = min(video * MERGE**2, max(self.max_patches, largest_grid))
        kept = math.ceil(tokens * self.kept)
        towers = tokens + in_slice * self.bytes_per_patch
        return _FIXED_BYTES + 2 * video * _FRAME_BYTES + kept + max(towers, self.compressing(clips))

    def compressing(self, clips: Sequence[ClipSize]) -> int:
        """Return the bytes that compression takes at its most, with what it is given and keeps.

        It works on grids padded to the largest; then on those that it kept, and on sound padded
        to twice as much at most (`layout.rows_alike`), whose scores take as much again.
        """
        chunks = sum(-(-clip.grids // 2) for clip in clips)
        video = 2 * chunks * max(clip.height * clip.width for clip in clips)
        audio = sum(clip.audio for clip in clips)
        tokens = sum(clip.video for clip in clips) + audio
        kept = math.ceil(tokens * self.kept)
        padded = max(video + audio, math.ceil(video * self.kept) + 4 * audio)
        rows = _WHOLE_COPIES * tokens + (self.copies - _WHOLE_COPIES) * padded + kept
        return rows * self.bytes_per_token

    def split(self, clips: Sequence[ClipSize]) -> Iterator[range]:
        """Yield the places of clips that fit together, in order; one that does not fit is alone."""
        start = 0
        for end in range(1, len(clips) + 1):
            whole = end == len(clips)
            if whole or self.needed(clips[start : end + 1]) > self.limit_bytes:
                yield range(start, end)
                start = end
