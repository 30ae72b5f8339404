"""From `config.source` to the work list: which videos this run decodes, reads, or fails."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import keys, rows
from pipeline.answer_index import ask_of
from pipeline.compression_index import Done
from pipeline.config import CaptionConfig
from pipeline.gone_videos import RollCall
from pipeline.known_windows import KnownWindows, known_windows, windows_left
from pipeline.named_videos import find_named
from pipeline.storage import Storage, join
from pipeline.token_cache import HITS, CacheIndex

_SCHEMAS = {"fresh": rows.IDENTITY, "cached": HITS, "failed": HITS}

_CHUNK = 8192  # videos looked up together
_PART = 50_000  # rows of one part file


@dataclass(frozen=True)
class WorkCounts:
    """What became of everything the source names; `videos` is the sum of the next five."""

    videos: int = 0
    fresh: int = 0  # to decode and compress, all of it or some of its windows
    cached: int = 0  # tokens found in the cache
    failed: int = 0  # no such object, forbidden, a broken line
    answered: int = 0  # nothing left to ask, or to compress
    given_up: int = 0  # failed before in a way that is not tried again (pipeline.retry)
    prompts: int = 0  # asked in this run, those of failed videos included
    prompts_answered: int = 0  # by earlier runs
    duplicates: int = 0  # asks named more than once, answered once
    broken_lines: int = 0  # of the manifest; each is a failed video
    windows: int = 0  # rows of the work list besides one a video: it is cut into windows


@dataclass(frozen=True)
class WorkList:
    """The part files of each kind, and their counts. A kind without rows has no files."""

    fresh: tuple[str, ...]
    cached: tuple[str, ...]
    failed: tuple[str, ...]
    counts: WorkCounts


def list_work(
    config: CaptionConfig,
    storage: Storage,
    *,
    done: Done,
    cached: CacheIndex,
    folder: str,
    own_prompts: bool = False,
    roll_call: RollCall | None = None,
) -> WorkList:
    """Write the work list of a run as Parquet parts under `folder`/work and return it.

    fresh: rows.IDENTITY; cached and failed: HITS. Only prompts that `done` has not answered are in
    it; a video without any is counted and left out. With `own_prompts` a line of the manifest that
    has none is a broken one, instead of asking the configured prompt. A prefix's objects are noted
    in `roll_call`. Raises StartupError, which names `source`, when nothing can be listed or read
    there.
    """
    counts: Counter[str] = Counter()
    videos = find_named(
        config, storage, counts, cached=cached, own_prompts=own_prompts, roll_call=roll_call
    )
    if config.listing.hash_content:
        videos = iter(_merged(videos, counts))
    folder = keys.plain(folder)
    parts = {kind: _Parts(storage, folder, kind) for kind in _SCHEMAS}
    while chunk := list(islice(videos, _CHUNK)):
        if roll_call is not None:
            roll_call.recognise([video["video_key"] for video in chunk])
        for kind, row in _sorted_out(chunk, done, cached, counts, config.media.window_s):
            counts["prompts"] += len(row["prompts"])
            parts[kind].add(row)
    counts["videos"] = sum(counts[kind] for kind in (*_SCHEMAS, "answered", "given_up"))
    files = {kind: parts[kind].close() for kind in _SCHEMAS}
    return WorkList(**files, counts=WorkCounts(**counts))


def _merged(videos: Iterable[dict[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
    """Return one row for each content. Only copies share a key, so only then is all held."""
    merged: dict[str, dict[str, Any]] = {}
    for video in videos:
        first = merged.setdefault(video["video_key"], video)
        if first is video:
            continue
        known = {prompt["prompt_id"]: prompt for prompt in first["prompts"]}
        for prompt in video["prompts"]:
            # The same name for two prompts: both stay, the later under the name of its text.
            name = prompt["prompt_id"]
            if known.get(name, prompt) != prompt:
                name = keys.prompt_id(prompt["prompt"], prompt["choices"])
            counts["duplicates"] += name in known
            known.setdefault(name, {**prompt, "prompt_id": name})
        merged[first["video_key"]] = {**first, "prompts": list(known.values())}
    return list(merged.values())


def _sorted_out(
    chunk: Sequence[dict[str, Any]],
    done: Done,
    cached: CacheIndex,
    counts: Counter[str],
    window_s: float,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kind and the row of each video that has something left to be asked.

    A video that is cut into windows may have several rows; it counts as the first of their kinds.
    """
    asks = [ask_of(video["video_key"], prompt) for video in chunk for prompt in video["prompts"]]
    answered = iter(done.answered(asks))
    places = cached.locate([video["video_key"] for video in chunk])
    for video, place in zip(chunk, places, strict=True):
        left = [prompt for prompt in video["prompts"] if not next(answered)]
        found: KnownWindows | None = None
        if window_s:
            video["window_s"] = window_s
            untouched = place is None and len(left) == len(video["prompts"])
            if untouched and video["error_type"] is None:
                found = known_windows(video, done, cached)
        if found:
            work = windows_left(video, found, done)
            more = {"prompts_answered": work.prompts_answered, "windows": work.more_rows}
            counts.update({work.kind: 1, **more})
            yield from work.rows
            continue
        counts["prompts_answered"] += len(video["prompts"]) - len(left)
        new = [
            prompt for prompt in left if not done.ask_given_up(*ask_of(video["video_key"], prompt))
        ]
        attempts = done.attempts(video["video_key"], new)
        row = {**video, "prompts": new, "attempts": attempts + 1}
        failure = done.given_up(video["video_key"])
        if not new:
            counts["given_up" if left else "answered"] += 1
            continue
        if failure and place is None:
            # Another question about a video that cannot be had: its failure is known.
            kind, row = "failed", failure.of({**row, "attempts": attempts})
        elif video["error_type"] is not None:
            kind = "failed"
        elif place is not None:
            kind, row = "cached", {**row, "cache_file": place.file, "cache_row": place.row}
        else:
            kind = "fresh"
        counts[kind] += 1
        yield kind, row


class _Parts:
    """Write rows of one kind as numbered files of _PART rows."""

    def __init__(self, storage: Storage, folder: str, kind: str) -> None:
        self._storage, self._folder, self._kind = storage, folder, kind
        self._rows: list[dict[str, Any]] = []
        self._files: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _PART:
            self._write()

    def close(self) -> tuple[str, ...]:
        if self._rows:
            self._write()
        return tuple(self._files)

    def _write(self) -> None:
        if self._kind == "cached":
            # File by file, so that a reader opens each once.
            self._rows.sort(key=lambda row: (row["cache_file"], row["cache_row"]))
        sink = pa.BufferOutputStream()
        pq.write_table(rows.build(self._rows, _SCHEMAS[self._kind]), sink)
        name = f"{self._kind}-{len(self._files):05d}.parquet"
        uri = join(self._folder, "work", name)
        self._storage.write(uri, sink.getvalue())
        self._files.append(uri)
        self._rows = []
