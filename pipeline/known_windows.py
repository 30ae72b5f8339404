"""Which windows of a video earlier runs know, and what is left of it to do.

Their keys say it: nobody has to ask the video how long it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.answer_index import ask_of
from pipeline.compression_index import Done
from pipeline.keys import window_key
from pipeline.token_cache import CacheIndex, Location

_AHEAD = 16  # windows looked for together: a run that was killed may have left gaps


@dataclass(frozen=True)
class KnownWindow:
    """A window that has kept tokens, an answer or a failure."""

    key: str
    place: Location | None  # of its tokens


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
        asks = [ask_of(key, prompt) for key in names for prompt in video["prompts"]]
        answered = np.any(np.reshape(done.answered(asks), (len(names), -1)), axis=1).tolist()
        found = zip(candidates, cached.locate(names), answered, strict=True)
        end = None
        before = len(windows)
        for (number, last, key), place, has_answer in found:
            if place is not None or has_answer or done.has_failed(key):
                windows[number] = KnownWindow(key, place)
                if last:
                    end = number + 1
        if end is not None:
            return KnownWindows(windows, complete=len(windows) == end)
        if len(windows) == before:
            return KnownWindows(windows, complete=False)
        start += _AHEAD


# The kind of a video is the first of those of its rows and windows.
_KINDS = ("fresh", "cached", "failed", "given_up", "answered")


@dataclass(frozen=True)
class WindowsLeft:
    """What a run has to do for a video of which windows are known."""

    kind: str  # one of stages.source.WorkCounts
    rows: Sequence[tuple[str, dict[str, Any]]]  # fresh, cached or failed
    prompts_answered: int

    @property
    def more_rows(self) -> int:
        """Return how many rows there are besides one for the video."""
        return max(0, len(self.rows) - 1)


def windows_left(video: Mapping[str, Any], found: KnownWindows, done: Done) -> WindowsLeft:
    """Return the rows of a video: one for each window with tokens, one for all without.

    The latter is the video itself, for decode, and names the windows that it need not decode.
    """
    kinds: set[str] = set()
    work: list[tuple[str, dict[str, Any]]] = []
    skip: list[int] = []
    # Prompts that some part has no answer to, and no tokens for one.
    missing = [] if found.complete else [*video["prompts"]]
    attempts = [done.attempts(video["video_key"], video["prompts"])]
    answered = 0
    for number, window in sorted(found.windows.items()):
        asks = [ask_of(window.key, prompt) for prompt in video["prompts"]]
        asked = list(zip(video["prompts"], asks, done.answered(asks), strict=True))
        left = [(prompt, ask) for prompt, ask, is_answered in asked if not is_answered]
        answered += len(asks) - len(left)
        new = [prompt for prompt, ask in left if not done.ask_given_up(*ask)]
        failure = done.given_up(window.key)
        row = {
            **video,
            "video_key": window.key,
            "start_s": number * video["window_s"],
            "prompts": new,
            "attempts": done.attempts(window.key, new) + 1,
        }
        if not new:
            kinds.add("given_up" if left else "answered")
        elif window.place is not None:
            place = {"cache_file": window.place.file, "cache_row": window.place.row}
            work.append(("cached", {**row, **place}))
        elif failure:
            work.append(("failed", failure.of({**row, "attempts": row["attempts"] - 1})))
        else:
            attempts.append(row["attempts"] - 1)
            missing += new
            continue
        skip.append(number)
    if not found.complete or len(skip) < len(found.windows):
        failure = done.given_up(video["video_key"])
        if failure:  # of what is left: a new question about it fails with it once
            kinds.add("given_up")
            new = [
                prompt
                for prompt in video["prompts"]
                if prompt in missing and not done.ask_given_up(*ask_of(video["video_key"], prompt))
            ]
            if new:
                row = {**video, "prompts": new, "attempts": attempts[0]}
                work.append(("failed", failure.of(row)))
        else:
            fresh = {**video, "attempts": max(attempts) + 1, "skip_windows": skip}
            work.append(("fresh", fresh))
    kinds |= {kind for kind, _ in work}
    return WindowsLeft(min(kinds, key=_KINDS.index), work, answered)
