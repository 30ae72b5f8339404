"""Find the objects behind video keys: in the videos files of earlier runs, or in the cache."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import keys, rows
from pipeline.answers import find_files
from pipeline.parquet import UNREADABLE, read_columns, read_each, require_lost
from pipeline.storage import S3, ObjectInfo, Storage, StorageError
from pipeline.token_cache import CacheIndex

log = logging.getLogger(__name__)

_PROBES = 64  # requests in flight: a probe is all latency
_COLUMNS = ("video_key", "object_key", "uri", "size_bytes", "etag")


@dataclass(frozen=True)
class _Known:
    """What an earlier run wrote of an object."""

    uri: str
    size_bytes: int | None  # the cache does not keep it
    etag: str
    key: str


@dataclass(frozen=True)
class Found:
    """The object behind a key, and its own key: the one that was asked for may be a window's."""

    info: ObjectInfo
    key: str


def find_videos(
    storage: Storage, output: str, cached: CacheIndex, video_keys: Sequence[str]
) -> dict[str, Found | str]:
    """Return the object of each key, or in words why there is none; a window's is its video's.

    An object that has changed since is refused, since its old tokens would answer for the new
    one: by key in S3, by size on a disk, where a key depends on the folder it was listed from.
    One that is away is taken as it was: its tokens may be in the cache.
    """
    known = {**_cached(storage, cached, video_keys), **_listed(storage, output, video_keys)}
    with ThreadPoolExecutor(_PROBES) as pool:
        found = pool.map(lambda key: _probe(storage, key, known.get(key)), video_keys)
        return dict(zip(video_keys, found, strict=True))


def _listed(storage: Storage, output: str, video_keys: Sequence[str]) -> dict[str, _Known]:
    files = find_files(output, storage)
    wanted = pa.array(video_keys, pa.string())

    def read(uri: str) -> list[dict[str, Any]]:
        try:
            table = rows.completed(read_columns(storage, uri, _COLUMNS), _COLUMNS, rows.VIDEOS)
        except (*UNREADABLE, StorageError) as error:
            require_lost(error)
            log.warning("videos file %s cannot be read, its keys are not found: %s", uri, error)
            return []
        # The key of a row is its window's, where the video was cut.
        own, whole = (pc.is_in(table.column(n), wanted) for n in ("video_key", "object_key"))
        found: list[dict[str, Any]] = table.filter(pc.or_(own, whole)).to_pylist()
        return found

    uris = [uri for uri in (*files.committed, *files.orphans) if "/videos-" in uri]
    known: dict[str, _Known] = {}
    for _, some in read_each(sorted(uris), read):
        for row in some:
            key = row["object_key"] or row["video_key"]
            video = _Known(row["uri"], row["size_bytes"], row["etag"] or "", key)
            known |= {row["video_key"]: video, key: video}
    return known


def _cached(storage: Storage, cached: CacheIndex, video_keys: Sequence[str]) -> dict[str, _Known]:
    places = sorted(
        (place.file, place.row, key)
        for key, place in zip(video_keys, cached.locate(video_keys), strict=True)
        if place
    )
    known: dict[str, _Known] = {}
    for file, group in groupby(places, key=lambda place: place[0]):
        try:
            uris = read_columns(storage, file, ["uri"]).column("uri")
        except (*UNREADABLE, StorageError) as error:  # a key file may speak for it all the same
            require_lost(error)
            log.warning("cache file %s cannot be read, its keys are not found: %s", file, error)
            continue
        known |= {key: _Known(uris[row].as_py(), None, "", key) for _, row, key in group}
    return known


def _probe(storage: Storage, key: str, known: _Known | None) -> Found | str:
    if known is None:
        return f"video_key {key} is in no earlier run of this output and not in the cache"
    try:
        info = storage.stat(known.uri)
    except StorageError as error:
        if error.error_type == "not_found":
            return Found(ObjectInfo(known.uri, known.size_bytes or 0, known.etag, 0), known.key)
        return f"video_key {key}: {error}"
    if known.uri.startswith(S3):
        same = keys.video_key(info, root="") == known.key
    else:
        same = known.size_bytes in (None, info.size_bytes)
    if same:
        return Found(info, known.key)
    return f"video_key {key} is of an older {known.uri}; name its uri to ask about the new one"
