"""From `config.source` to the work list: which videos this run decodes, reads, or fails."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import keys, rows
from pipeline.answer_index import ask_of
from pipeline.boundary import BoundaryError, Roots, roots_of, shown
from pipeline.compression_index import Done
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.gone_videos import RollCall
from pipeline.known_videos import find_videos
from pipeline.known_windows import KnownWindows, known_windows, windows_left
from pipeline.manifest import (
    ASKS,
    BrokenLine,
    Manifest,
    broken_line,
    folder_of,
    is_manifest,
    read_manifest,
)
from pipeline.storage import S3, ObjectInfo, Storage, StorageError, join
from pipeline.token_cache import HITS, CacheIndex

Prompt = dict[str, Any]  # of rows.PROMPT

_SCHEMAS = {"fresh": rows.IDENTITY, "cached": HITS, "failed": HITS}

_PROBES = 64  # requests in flight: a probe is all latency
_CHUNK = 8192  # videos probed and looked up together
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


@dataclass(frozen=True)
class _Candidate:
    """A video the source names, before it is known to exist."""

    uri: str
    prompts: list[Prompt]
    info: ObjectInfo | None  # a listing tells it, a manifest does not
    video_key: str | None = None  # where the manifest named the video by it


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
    if is_manifest(config.source):
        candidates: Iterator[_Candidate | BrokenLine] = _named(
            config, storage, counts, cached=cached, own_prompts=own_prompts
        )
        root = folder_of(config.source)
    else:
        candidates = _listed(config, storage, roll_call)
        root = config.source
    videos = _probed(candidates, storage, root, config)
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


def _default_prompt(config: CaptionConfig) -> Prompt:
    prompt = config.answer.prompt
    return {"prompt_id": keys.prompt_id(prompt), "prompt": prompt, "choices": None}


def _listed(
    config: CaptionConfig, storage: Storage, roll_call: RollCall | None
) -> Iterator[_Candidate]:
    """Yield the videos of a prefix; the listing tells size and etag, so none is probed."""
    endings = tuple(ending.lower() for ending in config.listing.extensions)
    prompts = [_default_prompt(config)]
    seen = taken = 0
    try:
        for info in storage.list(config.source):
            seen += 1
            if roll_call is not None:
                roll_call.name(info.uri)
            if info.uri.lower().endswith(endings):
                taken += 1
                yield _Candidate(info.uri, prompts, info)
    except StorageError as error:
        raise StartupError(f"source={config.source}: it cannot be listed: {error}") from error
    if not taken:
        found = f"{seen} objects, but none ends in {', '.join(endings)}" if seen else "no object"
        raise StartupError(
            f"source={config.source}: there is {found}; name a prefix that holds videos, or set "
            "listing.extensions"
        )


def _named(
    config: CaptionConfig,
    storage: Storage,
    counts: Counter[str],
    *,
    cached: CacheIndex,
    own_prompts: bool,
) -> Iterator[_Candidate | BrokenLine]:
    """Yield the videos of a manifest, each once with all its prompts; then its broken lines."""
    manifest, infos = _by_uri(config, storage, cached, read_manifest(storage, config.source))
    default = _default_prompt(config)
    broken = list(manifest.broken)
    lines = (
        line
        for batch in manifest.asks.to_batches(max_chunksize=_CHUNK)
        for line in batch.to_pylist()
    )
    for uri, asks in groupby(lines, key=lambda line: line["uri"]):
        prompts: dict[str, Prompt] = {}
        video_key = None
        for ask in asks:
            if own_prompts and ask["prompt"] is None:
                broken.append(broken_line(config.source, ask["line"], "it has no prompt"))
                continue
            video_key = video_key or ask["video_key"]
            text = default["prompt"] if ask["prompt"] is None else ask["prompt"]
            choices = json.loads(ask["choices"]) if ask["choices"] else None
            name = ask["prompt_id"] or keys.prompt_id(text, choices)
            prompt: Prompt = {"prompt_id": name, "prompt": text, "choices": choices}
            if prompts.setdefault(name, prompt) != prompt:
                message = (
                    f"prompt_id {name} already stands for another prompt, or other choices, of "
                    f"{uri}"
                )
                broken.append(broken_line(config.source, ask["line"], message))
            else:
                counts["duplicates"] += 1
        counts["duplicates"] -= len(prompts)
        named = list(prompts.values())
        if named:
            yield _Candidate(uri, named, infos.get(video_key or ""), video_key)
    if not manifest.asks.num_rows and not broken:
        raise StartupError(f"source={config.source}: the manifest is empty; name videos in it")
    counts["broken_lines"] = len(broken)
    yield from broken


def _by_uri(
    config: CaptionConfig, storage: Storage, cached: CacheIndex, manifest: Manifest
) -> tuple[Manifest, dict[str, ObjectInfo]]:
    """Give a uri to the lines that name a video by its key; return also these keys' objects."""
    named = pc.is_valid(manifest.asks.column("uri"))
    keyed = manifest.asks.filter(pc.invert(named))
    if not keyed.num_rows:
        return manifest, {}
    video_keys = pc.unique(keyed.column("video_key")).to_pylist()
    found = find_videos(storage, config.output, cached, video_keys)
    asks, broken = [], list(manifest.broken)
    for ask in keyed.to_pylist():
        info = found[ask["video_key"]]
        if isinstance(info, str):
            broken.append(broken_line(config.source, ask["line"], info))
        else:
            asks.append({**ask, "uri": info.info.uri, "video_key": info.key})
    table = pa.concat_tables([manifest.asks.filter(named), pa.Table.from_pylist(asks, ASKS)])
    table = table.sort_by([("uri", "ascending"), ("line", "ascending")])
    infos = {each.key: each.info for each in found.values() if not isinstance(each, str)}
    return Manifest(table, broken), infos


def _probed(
    candidates: Iterable[_Candidate | BrokenLine],
    storage: Storage,
    root: str,
    config: CaptionConfig,
) -> Iterator[dict[str, Any]]:
    """Yield a row of rows.IDENTITY for each candidate; one that cannot be probed has failed."""
    candidates = iter(candidates)
    probe = partial(
        _probe,
        storage=storage,
        root=root,
        hash_content=config.listing.hash_content,
        roots=roots_of(config),
        default=_default_prompt(config),
    )
    with ThreadPoolExecutor(_PROBES) as pool:
        while chunk := list(islice(candidates, _CHUNK)):
            # A listing told everything: no thread has anything to wait for.
            known = not config.listing.hash_content and all(
                isinstance(candidate, BrokenLine) or candidate.info for candidate in chunk
            )
            yield from map(probe, chunk) if known else pool.map(probe, chunk)


def _probe(
    candidate: _Candidate | BrokenLine,
    *,
    storage: Storage,
    root: str,
    hash_content: bool,
    roots: Roots,
    default: Prompt,
) -> dict[str, Any]:
    if isinstance(candidate, BrokenLine):
        uri, message = candidate.uri, candidate.message
        return _failed(uri, [default], "bad_manifest_row", message)
    uri = candidate.uri
    try:
        if not candidate.video_key:  # an earlier run let it in; decode opens it under the roots
            roots.check(uri)
        info = candidate.info or storage.stat(uri)
        hashed = hash_content and not candidate.video_key and not uri.startswith(S3)
        content = _sha256(storage, uri) if hashed else None
    except (BoundaryError, StorageError) as error:
        return _failed(shown(uri), candidate.prompts, error.error_type, str(error))
    key = candidate.video_key or keys.video_key(info, root=root, content_sha256=content)
    return {
        "video_key": key,
        "object_key": key,
        "uri": uri,
        "size_bytes": info.size_bytes,
        "etag": info.etag,
        "prompts": candidate.prompts,
        "error_type": None,
    }


def _failed(uri: str, prompts: list[Prompt], error_type: str, message: str) -> dict[str, Any]:
    key = keys.missing_key(uri)
    row = {"video_key": key, "object_key": key, "uri": uri, "prompts": prompts}
    return rows.failed(row, "source", error_type, message)


def _sha256(storage: Storage, uri: str) -> str:
    sha = hashlib.sha256()
    with storage.open(uri) as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


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
    video_keys = [video["video_key"] for video in chunk]
    places = cached.locate(video_keys)
    for video, place, attempts in zip(chunk, places, done.attempts(video_keys), strict=True):
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
