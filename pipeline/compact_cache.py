"""Merge the small files of a token cache while runs go on reading it.

Nothing is remembered but the files themselves. A merged file holds copies of rows, and its name
sorts behind theirs, so the index counts the copies from the moment it appears. A file none of whose
rows counts is deleted when it has been so for the grace period and the rows that count instead
have been verified. So this may be killed anywhere and started again.
"""

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from pipeline import cache_keys, rows, token_cache
from pipeline.key_index import Integers
from pipeline.parquet import UNREADABLE, open_parquet, read_columns
from pipeline.storage import Storage, StorageError, join
from pipeline.token_cache import CacheIndex, Location

log = logging.getLogger(__name__)

_MERGED = "part-merged-"  # sorts behind part-<run_id>-, which starts with a year
_STAMP = "%Y%m%dT%H%M%S.%fZ"  # follows, so that of two merged files the later counts


@dataclass(frozen=True)
class Compaction:
    """What one call did."""

    merged: int = 0  # small files whose rows were copied
    written: int = 0
    deleted: int = 0
    waiting: int = 0  # superseded files whose grace period goes on
    damaged: tuple[str, ...] = ()  # rows that no longer are what was written

    def __add__(self, other: "Compaction") -> "Compaction":
        """Return both together."""
        return Compaction(
            self.merged + other.merged,
            self.written + other.written,
            self.deleted + other.deleted,
            self.waiting + other.waiting,
            self.damaged + other.damaged,
        )


def compact_cache(
    storage: Storage, folder: str, *, target_bytes: int, grace_s: float, now: datetime
) -> Compaction:
    """Compact `<cache>/<fingerprint>`: delete what was superseded, then merge.

    `target_bytes` is the size of a merged file; files below a quarter of it, and files with rows
    that count no more, are merged.
    """
    index = CacheIndex(storage, folder)
    deleted = _delete(storage, folder, index, before=now - timedelta(seconds=grace_s))
    if deleted.damaged:  # an older copy of a damaged row counts again
        index = CacheIndex(storage, folder)
    done = deleted + _merge(storage, folder, index, target_bytes)
    found = token_cache.list_folder(storage, folder)
    cache_keys.renew_keys(storage, folder, found.files, found.key_files)
    return done


def _merge(storage: Storage, folder: str, index: CacheIndex, target_bytes: int) -> Compaction:
    done = Compaction()
    sizes = {info.uri: info.size_bytes for info in storage.list(folder, suffixes=(".parquet",))}
    batch: dict[str, tuple[int, Integers]] = {}
    batch_bytes = 0
    for file, length, live in index.rows_of_files():
        size = sizes.get(file, target_bytes)
        if not len(live) or (size >= target_bytes / 4 and len(live) == length):
            continue
        if batch and batch_bytes + size > target_bytes:
            done += _merge_files(storage, folder, batch)
            batch, batch_bytes = {}, 0
        batch[file] = length, live
        batch_bytes += size
    return done + _merge_files(storage, folder, batch)


def _merge_files(
    storage: Storage, folder: str, files: Mapping[str, tuple[int, Integers]]
) -> Compaction:
    """Copy the rows that count, each verified, into one file."""
    whole = all(len(live) == length for length, live in files.values())
    if not files or (len(files) == 1 and whole):
        return Compaction()
    damaged: list[str] = []

    def copies() -> Iterator[pa.Table]:
        for file, (_, live) in files.items():
            try:
                with open_parquet(storage, file) as part:
                    for row in live.tolist():
                        try:
                            yield token_cache.read_row(part, row)
                        except UNREADABLE as error:
                            damaged.append(_bury(storage, file, row, error))
            except UNREADABLE as error:  # the index knew its keys from a key file
                damaged.append(_bury_all(storage, folder, file, live, error))

    uri = _new_name(storage, folder)
    written = token_cache.write_rows(storage, uri, copies())
    return Compaction(merged=len(files), written=int(written > 0), damaged=tuple(damaged))


def _new_name(storage: Storage, folder: str) -> str:
    """Return a name behind those of all merged files, also of a machine whose clock is ahead."""
    files = token_cache.list_folder(storage, folder).files
    earlier = [_merged_at(file) for file in files if _is_merged(file)]
    stamp = max([datetime.now(UTC), *(time + timedelta(microseconds=1) for time in earlier)])
    return join(folder, f"{_MERGED}{stamp.strftime(_STAMP)}-{uuid.uuid4().hex[:8]}.parquet")


def _is_merged(file: str) -> bool:
    return file.rpartition("/")[2].startswith(_MERGED)


def _merged_at(file: str) -> datetime:
    stamp = file.rpartition("/")[2].removeprefix(_MERGED).partition("-")[0]
    return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)


def _delete(storage: Storage, folder: str, index: CacheIndex, *, before: datetime) -> Compaction:
    done = Compaction()
    found = token_cache.list_folder(storage, folder)
    files = set(found.files)
    buried = token_cache.read_tombstones(storage, folder, found.tombstones)
    dead = [file for file, _, live in index.rows_of_files() if not len(live)]
    for file in dead:
        try:
            table = read_columns(storage, file, ["video_key", "created_at"])
        except UNREADABLE as error:
            log.warning("%s, none of whose rows counts, is deleted: %s", file, error)
            table = rows.CACHED.empty_table()
        heirs = _heirs(index, table)
        if _superseded_at(storage, heirs, table) > before:
            done += Compaction(waiting=1)
        elif damaged := _damaged(storage, heirs):
            done += Compaction(damaged=tuple(damaged))
        else:
            storage.delete(file)
            files.discard(file)
            done += Compaction(deleted=1)
    for tombstone, places in buried.items():  # after their files, lest a damaged row is offered
        if not any(file in files for file, _ in places):
            storage.delete(tombstone)
    return done


def _heirs(index: CacheIndex, table: pa.Table) -> list[Location]:
    """Return the rows that count instead of those of a file."""
    places = index.locate(table.column("video_key").to_pylist())
    return sorted({place for place in places if place}, key=lambda place: (place.file, place.row))


def _superseded_at(storage: Storage, heirs: Sequence[Location], table: pa.Table) -> datetime:
    """Return since when none of a file's rows counts."""
    times: list[datetime] = [datetime.fromtimestamp(0, UTC)]
    if not heirs:  # all its rows are buried, at the earliest when they were written
        times += table.column("created_at").to_pylist()
    for place in heirs:
        if _is_merged(place.file):
            times.append(_merged_at(place.file))
            continue
        try:
            created = read_columns(storage, place.file, ["created_at"]).column("created_at")
            times.append(created[place.row].as_py())
        except UNREADABLE:
            pass  # _damaged buries it
    return max(times)


def _damaged(storage: Storage, places: Sequence[Location]) -> list[str]:
    """Bury the rows that are not what was written; say which."""
    found = []
    for place in places:
        try:
            with open_parquet(storage, place.file) as part:
                token_cache.read_row(part, place.row)
        except UNREADABLE as error:
            found.append(_bury(storage, place.file, place.row, error))
    return found


def _bury_all(storage: Storage, folder: str, file: str, live: Integers, error: Exception) -> str:
    """Bury the rows of a file that cannot be opened; the next call deletes it."""
    places = [("", Location(file, row)) for row in live.tolist()]
    token_cache.bury_all(storage, folder, places, reason=str(error))
    message = f"{file}: {error}; its {len(places)} videos are compressed again by the next run"
    log.warning(message)
    return message


def _bury(storage: Storage, file: str, row: int, error: Exception) -> str:
    try:
        video_keys = read_columns(storage, file, ["video_key"]).column("video_key")
        video_key = str(video_keys[row].as_py())
    except (*UNREADABLE, StorageError):
        video_key = ""  # only for a person who reads the tombstone
    token_cache.bury(storage, file, row, video_key=video_key, reason=str(error))
    message = f"{file}, row {row}: {error}; its video is compressed again by the next run"
    log.warning(message)
    return message
