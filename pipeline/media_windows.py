"""Where a long video is cut: windows of equal length, each decoded as a clip of that span."""

import math
from dataclasses import dataclass

from pipeline.config import CHUNK_S


@dataclass(frozen=True)
class Window:
    """One of the windows of a video, in seconds from its first frame."""

    number: int
    count: int  # windows of the video; 1: it is whole
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Return how long it is."""
        return self.end_s - self.start_s

    @property
    def is_last(self) -> bool:
        """Return whether the video ends with it."""
        return self.number == self.count - 1


def cut(duration_s: float, window_s: float) -> list[Window]:
    """Return the windows of a video; one where it is not cut (`window_s` is 0, or it is shorter).

    What is left behind the last whole window and is no longer than a chunk belongs to it: a file
    of 600.04 s has five windows of 120 s, and none of one frame.
    """
    count = max(1, math.ceil((duration_s - CHUNK_S) / window_s)) if window_s else 1
    ends = [*((number + 1) * window_s for number in range(count - 1)), duration_s]
    return [Window(number, count, number * window_s, end) for number, end in enumerate(ends)]
