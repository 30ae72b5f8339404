"""Which windows of a video earlier runs know: nobody has to ask the video how long it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.compression_index import Done
from pipeline.keys import window_key
from pipeline.token_cache import CacheIndex, Location

_AHEAD = 16  # windows looked for together: a run that was killed may have left gaps


@dataclass(frozen=True)
class KnownWindow:
    """A window that has kept tokens, an answer or a failure."""

    key: str
    place: Location | None  # of its tokens
    attempts: int  # that failed


@dataclass(frozen=True)
class KnownWindows:
    """The windows of a video that are known, by number."""

    windows: dict[int, KnownWindow]
    complete: bool  # whether they are all it has

    def __bool__(self) -> bool:
        """Return whether any is known."""
        return bool(self.windows)


def known_windows(video: dict[str, Any], done: Done, cached: CacheIndex) -> KnownWindows:
    """Look for the windows of a video by their keys, which also say which is the last."""
    windows: dict[int, KnownWindow] = {}
    start = 0
    while True:
        candidates = [
            (number, last, window_key(video["video_key"], video["window_s"], number, last=last))
            for number in range(start, start + _AHEAD)
            for last in (False, True)
        ]
        names = [key for _, _, key in candidates]
        asks = [
            (key, prompt["prompt_id"], prompt["prompt"], prompt["choices"])
            for key in names
            for prompt in video["prompts"]
        ]
        answered = np.any(np.reshape(done.answered(asks), (len(names), -1)), axis=1).tolist()
        found = zip(candidates, cached.locate(names), done.attempts(names), answered, strict=True)
        end = None
        before = len(windows)
        for (number, last, key), place, attempts, has_answer in found:
            if place is not None or attempts or has_answer:
                windows[number] = KnownWindow(key, place, attempts)
                if last:
                    end = number + 1
        if end is not None:
            return KnownWindows(windows, complete=len(windows) == end)
        if len(windows) == before:
            return KnownWindows(windows, complete=False)
        start += _AHEAD
