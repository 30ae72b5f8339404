"""Merge the small files of an output and drop the rows that nobody sees, while readers go on.

The merged files are those of a run of their own. Its marker says which files it replaces, so that
readers change over in one moment; what they may still be reading is deleted a grace period later:
first the files, then the markers that name nothing else, those of nights without work among them.
Killed anywhere, the next call goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import keys, rows
from pipeline.answers import (
    COMMITTED,
    Commit,
    commit,
    is_answers,
    list_output,
)
from pipeline.compact_cache import Compaction
from pipeline.errors import StartupError
from pipeline.parquet import UNREADABLE, read_columns
from pipeline.readers_view import last_of, newest_of_uri, seen_by_readers, undeleted
from pipeline.storage import Storage, StorageError, join

_ASK = ["video_key", "prompt_id", "prompt", "fingerprint"]
# What settles which rows are kept.
_SETTLES = [
    *_ASK,
    *("object_key", "window_s", "start_s"),
    *("uri", "status", "error_stage", "error_type", "attempts", "created_at"),
]


@dataclass(frozen=True)
class _File:
    """What is kept of a file."""

    uri: str
    rows: pa.ChunkedArray  # their numbers
    erases: bool = False  # it holds rows about a deleted object: it is rewritten whatever its size


def compact_answers(
    storage: Storage,
    output: str,
    *,
    target_bytes: int,
    grace_s: float,
    now: datetime,
    drop_unreadable: bool = False,
) -> Compaction:
    """Compact an output: delete what was replaced, then merge files below a quarter of the target.

    Kept are the rows that readers see, the newest row of each uri, which settles what is seen, and
    of each question without an answer its last failure of each kind, which settles what is tried
    again. What was answered about deleted objects is dropped, from large files too. Raises
    StartupError when a committed file cannot be read: nothing is dropped on a guess.
    With `drop_unreadable` such files are replaced by nothing, and what they held is asked again.
    """
    output = keys.plain(output)
    done = _delete(storage, output, before=now - timedelta(seconds=grace_s))
    found, commits = list_output(output, storage)
    replaced = {uri for each in commits.values() for uri in each.replaced(output)}
    listed = {uri for each in commits.values() for uri in each.listed(output)} - replaced
    unreadable = [uri for uri in sorted(listed) if drop_unreadable and _is_lost(storage, uri)]
    listed -= set(unreadable)
    run_id = keys.new_run_id()
    merged: list[str] = []
    written = 0
    for answers in (True, False):
        uris = sorted(uri for uri in listed if is_answers(uri) == answers)
        kind = _settled(storage, uris, answers=answers)
        for batch in _batches(kind, found, target_bytes):
            uri = join(
                output, run_id, f"{'answers' if answers else 'videos'}-{written:05d}.parquet"
            )
            _copy(storage, batch, uri, rows.ANSWERS if answers else rows.VIDEOS)
            merged += [file.uri for file in batch]
            written += 1
    if merged or unreadable:
        inherited = [uri for uri in replaced if uri in found or _is_named(uri, commits, output)]
        commit(storage, output, run_id, replaces=sorted({*merged, *unreadable, *inherited}))
    dropped = tuple(f"{uri}: cannot be read; the next run asks again" for uri in unreadable)
    return done + Compaction(merged=len(merged), written=written, damaged=dropped)


def _is_lost(storage: Storage, uri: str) -> bool:
    """Say whether a file is gone or not what was written; a store that is away raises."""
    try:
        read_columns(storage, uri, (rows.ANSWERS if is_answers(uri) else rows.VIDEOS).names)
    except UNREADABLE:
        return True
    except StorageError as error:
        if error.error_type != "not_found":
            raise
        return True
    return False


def _is_named(uri: str, commits: Mapping[str, Commit], output: str) -> bool:
    return any(uri in each.listed(output) for each in commits.values())


def _settled(storage: Storage, uris: Sequence[str], *, answers: bool) -> list[_File]:
    """Return what is kept of each file."""
    columns = _SETTLES if answers else ["video_key"]
    schema = pa.schema((rows.ANSWERS if answers else rows.VIDEOS).field(name) for name in columns)
    tables = []
    for number, uri in enumerate(uris):
        table = _read(storage, uri, schema).cast(schema)
        length = table.num_rows
        table = table.append_column("file", pa.array(np.full(length, number, np.int64)))
        tables.append(table.append_column("row", pa.array(np.arange(length))))
    none = schema.empty_table()
    for name in ("file", "row"):
        none = none.append_column(name, pa.array([], pa.int64()))
    table = pa.concat_tables([none, *tables])
    table = table.append_column("place", pa.array(np.arange(table.num_rows)))
    kept = table.take(_kept_answers(table) if answers else _kept_videos(table))
    of_file = np.asarray(kept.column("file"))
    erased = _files_of_deleted(table) if answers else set()
    return [
        _File(uri, kept.filter(pa.array(of_file == number)).column("row"), number in erased)
        for number, uri in enumerate(uris)
    ]


def _files_of_deleted(table: pa.Table) -> set[int]:
    """Return the numbers of the files that hold deletions or rows that these hide."""
    left = undeleted(table).column("place")
    gone = table.filter(pc.invert(pc.is_in(table.column("place"), left.combine_chunks())))
    return set(pc.unique(gone.column("file")).to_pylist())


def _kept_answers(table: pa.Table) -> pa.Array:
    """Return the places of the rows that are kept, in their order.

    No deletion is: what it hides is dropped in the same moment, also from large files.
    """
    table = undeleted(table)
    seen = seen_by_readers(table)
    failed = table.filter(pc.equal(table.column("status"), "failed"))
    failures = last_of(failed, [*_ASK, "error_type"], first=failed.column("attempts"))
    answered = seen.filter(pc.equal(seen.column("status"), "ok")).select(_ASK)
    failures = failures.join(answered, keys=_ASK, join_type="left anti")
    places = [each.column("place") for each in (seen, newest_of_uri(table), failures)]
    return pa.array(np.unique(np.concatenate([np.asarray(each) for each in places])))


def _kept_videos(table: pa.Table) -> pa.Array:
    last = table.group_by("video_key").aggregate([("place", "max")]).column("place_max")
    return pa.array(np.sort(np.asarray(last)))


def _batches(
    files: Sequence[_File], sizes: Mapping[str, int], target_bytes: int
) -> list[list[_File]]:
    """Return the files that are rewritten, by merged file: small ones, and what must be erased."""
    batches: list[list[_File]] = [[]]
    batch_bytes = 0
    for file in files:
        size = sizes.get(file.uri, 0)
        if size >= target_bytes / 4 and not file.erases:
            continue
        if batches[-1] and batch_bytes + size > target_bytes:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(file)
        batch_bytes += size
    return [batch for batch in batches if len(batch) > 1 or any(file.erases for file in batch)]


def _copy(storage: Storage, batch: Sequence[_File], uri: str, schema: pa.Schema) -> None:
    """Write the kept rows of some files as one, and see that they can be read back."""
    tables = [_read(storage, file.uri, schema).cast(schema).take(file.rows) for file in batch]
    merged = pa.concat_tables([schema.empty_table(), *tables])
    sink = pa.BufferOutputStream()
    pq.write_table(merged, sink, compression="zstd", write_page_checksum=True)
    storage.write(uri, sink.getvalue())
    if not _read(storage, uri, schema).cast(schema).equals(merged):
        raise StorageError("storage_error", f"{uri}: reads back as other rows than were written")


def _read(storage: Storage, uri: str, schema: pa.Schema) -> pa.Table:
    try:
        return rows.completed(read_columns(storage, uri, schema.names), schema.names, schema)
    except UNREADABLE as error:
        raise StartupError(
            f"output: {uri} cannot be read ({error}), so nothing is dropped; jobs/verify.py names "
            "all such files, drop_unreadable=true gives them up"
        ) from error


def _delete(storage: Storage, output: str, *, before: datetime) -> Compaction:
    found, commits = list_output(output, storage)
    done = Compaction()
    for each in commits.values():
        gone = sorted(each.replaced(output) & found.keys())
        if gone and _moment(each) > before:
            done += Compaction(waiting=len(gone))
        elif gone:
            for uri in each.listed(output):
                _read(storage, uri, rows.ANSWERS if is_answers(uri) else rows.VIDEOS)
            for uri in gone:
                storage.delete(uri)
                found.pop(uri)
            done += Compaction(deleted=len(gone))
    _delete_markers(storage, output, found, commits, before=before)
    return done


def _moment(each: Commit) -> datetime:
    return datetime.fromisoformat(each.created_at).astimezone(UTC)


def _delete_markers(
    storage: Storage,
    output: str,
    found: Mapping[str, int],
    commits: Mapping[str, Commit],
    *,
    before: datetime,
) -> None:
    """Delete the markers all of whose files are gone because another marker replaces them.

    A run that had nothing to do has none: who waits for its marker has the grace period to see it.
    """
    left = dict(commits)
    for run_id, each in sorted(commits.items()):
        others = [other for name, other in left.items() if name != run_id]
        replaced = {uri for other in others for uri in other.replaced(output)}
        named = {uri for other in others for uri in other.listed(output)}
        files = each.listed(output)
        needed = (each.replaced(output) & (named | found.keys())) - replaced
        seen = files or _moment(each) <= before
        if seen and files <= replaced and not files & found.keys() and not needed:
            storage.delete(join(output, run_id, COMMITTED))
            left.pop(run_id)
