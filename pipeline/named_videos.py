"""The videos that `config.source` names: those under a prefix, or those of a manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import keys, rows
from pipeline.boundary import BoundaryError, Roots, roots_of, shown
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.gone_videos import RollCall
from pipeline.known_videos import find_videos
from pipeline.manifest import (
    ASKS,
    BrokenLine,
    Manifest,
    broken_line,
    folder_of,
    is_manifest,
    read_manifest,
)
from pipeline.storage import S3, ObjectInfo, Storage, StorageError
from pipeline.token_cache import CacheIndex

Prompt = dict[str, Any]  # of rows.PROMPT

_PROBES = 64  # requests in flight: a probe is all latency
_CHUNK = 8192  # videos probed together


@dataclass(frozen=True)
class _Candidate:
    """A video the source names, before it is known to exist."""

    uri: str
    prompts: list[Prompt]
    info: ObjectInfo | None  # a listing tells it, a manifest does not
    video_key: str | None = None  # where the manifest named the video by it


def find_named(
    config: CaptionConfig,
    storage: Storage,
    counts: Counter[str],
    *,
    cached: CacheIndex,
    own_prompts: bool,
    roll_call: RollCall | None,
) -> Iterator[dict[str, Any]]:
    """Yield a row of rows.IDENTITY, all prompts in it, for each video; failed ones among them.

    A video has failed that cannot be probed, and so has a broken line of a manifest. `counts`
    takes `duplicates` and `broken_lines`. With `own_prompts` a line that has no prompt is broken.
    A prefix's objects are noted in `roll_call`. Raises StartupError, which names `source`, when
    nothing can be listed or read there.
    """
    if is_manifest(config.source):
        candidates: Iterator[_Candidate | BrokenLine] = _named(
            config, storage, counts, cached=cached, own_prompts=own_prompts
        )
        root = folder_of(config.source)
    else:
        candidates = _listed(config, storage, roll_call)
        root = config.source
    return _probed(candidates, storage, root, config)


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
            if ask["video_key"] not in (None, video_key):
                message = (
                    f"video_key {ask['video_key']} is another version of {uri} than {video_key}, "
                    "which another line names; readers see one, so ask about one"
                )
                broken.append(broken_line(config.source, ask["line"], message))
                continue
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
