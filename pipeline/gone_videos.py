"""Videos whose objects are gone: earlier runs know them, a complete listing names them no more.

They are reported, and with `sync.delete=true` their answers leave the readers' view and their
tokens the index. Nothing is removed unless all of this holds:

- the source is a prefix: a manifest may name any part of a corpus;
- its listing came to its end without an error and named at least one video;
- at most `sync.max_share` of the videos known below it are missing;
- the store, asked for the very object, says that there is none.

The bytes go with `jobs/compact.py`: it drops these rows from answers and cache.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import key_index, keys, rows, token_cache
from pipeline.answer_index import SEEN_VIDEOS
from pipeline.answers import find_files
from pipeline.parquet import UNREADABLE, read_columns, read_each, require_lost
from pipeline.readers_view import DELETED, objects
from pipeline.spilled_rows import SpilledRows
from pipeline.storage import Storage, StorageError, join
from pipeline.token_cache import CacheIndex

log = logging.getLogger(__name__)

_PROBES = 64  # requests in flight: a probe is all latency
_NAMED_AT_ONCE = 8192


class RollCall:
    """Know which of the videos of earlier runs a listing names."""

    def __init__(self, videos: Iterable[pa.Table], prefix: str) -> None:
        """Take what is known (SEEN_VIDEOS); what is not below `prefix` is left out."""
        self._videos = SpilledRows(SEEN_VIDEOS)
        for table in videos:
            below = pc.starts_with(table.column("uri"), pattern=keys.plain(prefix) + "/")
            self._videos.add(table.filter(below))
        self._uri_index = key_index.KeyIndex(
            key_index.entries(uris, places) for places, uris, _ in self._blocks()
        )
        self._key_index = key_index.KeyIndex(
            key_index.entries(video_keys, places) for places, _, video_keys in self._blocks()
        )
        # Of the places in the two indexes: a byte or two for each video that is known.
        self._named: npt.NDArray[np.bool_] = np.zeros(len(self._videos), np.bool_)
        self._recognised: npt.NDArray[np.bool_] = np.zeros(len(self._videos), np.bool_)
        self._waiting: list[str] = []

    def __len__(self) -> int:
        """Return the number of uris that are known below the prefix."""
        return len(self._uri_index)

    def name(self, uri: str) -> None:
        """Note an object of the listing, whether it is taken as a video or not."""
        self._waiting.append(uri)
        if len(self._waiting) >= _NAMED_AT_ONCE:
            self._note()

    def recognise(self, video_keys: Sequence[str]) -> None:
        """Note videos of the listing by their keys: with hash_content a moved one keeps its own."""
        places = self._key_index.find(key_index.from_hex(list(video_keys)))
        self._recognised[places[places >= 0]] = True

    def absent(self) -> list[str]:
        """Return the uris that nothing was noted of, sorted."""
        self._note()
        there = self._named.copy()
        for _, uris, video_keys in self._blocks():
            recognised = self._recognised[self._key_index.find(video_keys)]
            there[self._uri_index.find(uris)[recognised]] = True
        absent = np.zeros(len(there), np.bool_)
        for places in self._uri_index.places():  # one for each uri, of all rows about it
            absent[places] = ~there[places]
        found: list[str] = []
        start = 0
        for table in self._videos:
            own = pa.array(absent[start : start + table.num_rows])
            found += table.column("uri").filter(own).to_pylist()
            start += table.num_rows
        return sorted(found)

    def _blocks(self) -> Iterator[tuple[key_index.Integers, key_index.Keys, key_index.Keys]]:
        """Yield what is known in pieces: the places of rows, their uris as keys, their keys."""
        start = 0
        for table in self._videos:
            for block in table.to_batches(max_chunksize=_NAMED_AT_ONCE):
                uris, video_keys = (block.column(name).to_pylist() for name in SEEN_VIDEOS.names)
                places = np.arange(start, start + block.num_rows)
                yield places, _digests(uris), key_index.from_hex(video_keys)
                start += block.num_rows

    def _note(self) -> None:
        places = self._uri_index.find(_digests(self._waiting))
        self._named[places[places >= 0]] = True
        self._waiting = []


def _digests(uris: Sequence[str]) -> key_index.Keys:
    # A name that is not UTF-8 stands in the rows with its bytes spelt out.
    digests = (hashlib.sha256(uri.encode(errors="backslashreplace")).digest() for uri in uris)
    return np.frombuffer(b"".join(digests), key_index.KEY)


def known_videos(
    storage: Storage,
    output: str,
    seen: Iterable[pa.Table],
    cached: CacheIndex,
    unreadable: list[str],
) -> Iterator[pa.Table]:
    """Yield SEEN_VIDEOS of what readers see, and of what has tokens without an answer.

    Videos files that cannot be read are added to `unreadable`: what only they know is unknown.
    """
    yield from seen
    for uri, table in _read_videos(storage, output):
        if table is None:
            unreadable.append(uri)
            continue
        places = cached.locate(table.column("video_key").to_pylist())
        kept = table.filter(pa.array([place is not None for place in places], pa.bool_()))
        yield pa.table([kept.column("uri"), objects(kept)], schema=SEEN_VIDEOS)


def _read_videos(storage: Storage, output: str) -> Iterator[tuple[str, pa.Table | None]]:
    """Yield each videos file and what it says of objects; None: it cannot be read."""
    files = find_files(output, storage)
    names = [*SEEN_VIDEOS.names, "object_key"]
    schema = pa.schema(rows.VIDEOS.field(name) for name in names)

    def read(uri: str) -> pa.Table | None:
        try:
            return rows.completed(read_columns(storage, uri, names), names, schema).cast(schema)
        except (*UNREADABLE, StorageError) as error:
            require_lost(error)
            log.warning("videos file %s cannot be read, it is left out: %s", uri, error)
            return None

    uris = [uri for uri in (*files.committed, *files.orphans) if "/videos-" in uri]
    yield from read_each(uris, read, files.sizes)


@dataclass(frozen=True)
class Gone:
    """What a listing did not name of what is known, and what is done about it."""

    absent: tuple[str, ...] = ()  # uris
    removed: tuple[str, ...] = ()  # of them
    warning: str = ""  # why none is removed, although it was asked for


def settle(storage: Storage, roll_call: RollCall | None, *, delete: bool, max_share: float) -> Gone:
    """Say which videos are gone, and which of them are removed: see the head of this file."""
    absent = roll_call.absent() if roll_call is not None else []
    if roll_call is None or not absent or not delete:
        return Gone(tuple(absent))
    share = len(absent) / len(roll_call)
    if share > max_share:
        return Gone(
            tuple(absent),
            warning=f"nothing was removed: {len(absent):,} of {len(roll_call):,} known videos are "
            f"gone ({share:.0%}), more than sync.max_share={max_share:g}. Check `source`; if they "
            f"are meant to be gone, run once with sync.max_share={min(1.0, share + 0.005):.2f}",
        )
    with ThreadPoolExecutor(_PROBES) as pool:
        gone = pool.map(lambda uri: _is_gone(storage, uri), absent)
        removed = [uri for uri, is_gone in zip(absent, gone, strict=True) if is_gone]
    there = len(absent) - len(removed)
    return Gone(
        tuple(absent),
        tuple(removed),
        warning=f"{there:,} videos were not in the listing but are in the store, or it does not "
        "say; they stay"
        if there
        else "",
    )


def _is_gone(storage: Storage, uri: str) -> bool:
    try:
        storage.stat(uri)
    except StorageError as error:
        return error.error_type == "not_found"
    return False


def hide_answers(storage: Storage, folder: str, gone: Gone, *, not_before: datetime) -> None:
    """Write what is gone into a run's folder: `gone.parquet`, a row for each uri.

    For each that is removed also a row of rows.ANSWERS that hides all earlier ones; like all that
    a run writes it counts from the run's commit on.
    """
    if not gone.absent:
        return
    removed = set(gone.removed)
    columns = {"uri": gone.absent, "removed": [uri in removed for uri in gone.absent]}
    _write(storage, join(folder, "gone.parquet"), pa.table(columns))
    if removed:
        run_id = folder.rpartition("/")[2]
        moment = max(datetime.now(UTC), not_before)
        deletions = [
            {"uri": uri, "status": DELETED, "run_id": run_id, "created_at": moment}
            for uri in gone.removed
        ]
        table = rows.build(deletions, rows.ANSWERS)
        _write(storage, join(folder, "answers-deleted.parquet"), table)


def _write(storage: Storage, uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write(uri, sink.getvalue())


def bury_tokens(storage: Storage, output: str, cache_root: str, gone: Gone) -> None:
    """Take the tokens of removed videos, of all versions and settings, out of the indexes.

    Killed before its end it is done by the next run, which still finds them in the videos files.
    Where one of these cannot be read, every file of the caches is asked for its uris instead.
    """
    if not gone.removed:
        return
    wanted = pa.array(gone.removed, pa.string())
    known: set[str] = set()
    lost = False
    for _, table in _read_videos(storage, output):  # one at a time: all would be the corpus
        if table is None:
            lost = True
        else:
            known.update(_keys_of(table, wanted))
    for folder in token_cache.find_folders(storage, cache_root):
        index = CacheIndex(storage, folder)
        asked = sorted(known | _cached_keys(storage, index, wanted) if lost else known)
        places = zip(asked, index.locate(asked), strict=True)
        found_here = [(key, place) for key, place in places if place is not None]
        if found_here:
            token_cache.bury_all(storage, folder, found_here, reason="their objects are gone")


def _keys_of(table: pa.Table, uris: pa.Array) -> list[str]:
    found = table.filter(pc.is_in(table.column("uri"), uris))
    video_keys: list[str] = found.column("video_key").to_pylist()
    return video_keys


def _cached_keys(storage: Storage, index: CacheIndex, uris: pa.Array) -> set[str]:
    video_keys: set[str] = set()
    for file, _, live in index.rows_of_files():
        try:
            table = read_columns(storage, file, ["uri", "video_key"]) if len(live) else None
        except (*UNREADABLE, StorageError) as error:
            require_lost(error)
            continue  # its tokens are lost with it
        if table is not None:
            video_keys.update(_keys_of(table, uris))
    return video_keys
