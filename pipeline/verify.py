"""Check that a cache and an output are whole; say in words what is not."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from pipeline import cache_keys, keys, rows, token_cache
from pipeline.answers import COMMITTED, Commit, is_answers, list_output
from pipeline.parquet import UNREADABLE, open_parquet, read_columns
from pipeline.readers_view import seen_by_readers
from pipeline.storage import Storage, StorageError, join


def verify_cache(storage: Storage, folder: str) -> Iterator[str]:
    """Yield the faults of `<cache>/<fingerprint>`: every row is read and its sha256 compared.

    A damaged row that a tombstone names is no fault: runs know of it.
    """
    yield from _verify_fingerprint(storage, folder)
    found = token_cache.list_folder(storage, folder)
    tombstones = token_cache.read_tombstones(storage, folder, found.tombstones)
    yield from (f"{uri}: is no tombstone" for uri in found.tombstones if uri not in tombstones)
    yield from _verify_keys(storage, folder, found)
    buried = {place for places in tombstones.values() for place in places}
    for file in found.files:
        try:
            with open_parquet(storage, file) as part:
                if not part.schema_arrow.equals(rows.CACHED):
                    yield f"{file}: its columns are not those of the cache"
                    continue
                for row in range(part.metadata.num_rows):
                    try:
                        token_cache.read_row(part, row)
                    except UNREADABLE as error:
                        if (file, row) not in buried:
                            yield f"{file}, row {row}: {error}"
        except (*UNREADABLE, StorageError) as error:
            yield f"{file}: cannot be read: {error}"


def _verify_keys(storage: Storage, folder: str, found: token_cache.Folder) -> Iterator[str]:
    """Compare each key file with the part files that it speaks for."""
    for uri in found.key_files:
        named = cache_keys.read_key_file(storage, folder, uri)
        if named is None:
            yield f"{uri}: cannot be read"
            continue
        for file, (wanted, _) in named.items():
            part = cache_keys.read_part(storage, file) if file in found.files else None
            if part is not None and not np.array_equal(part[0], wanted):
                yield f"{uri}: names other videos than {file} holds"


def _verify_fingerprint(storage: Storage, folder: str) -> Iterator[str]:
    uri = join(folder, "fingerprint.json")
    try:
        found = keys.fingerprint(json.loads(storage.read(uri)))
        if found != folder.rpartition("/")[2]:
            yield f"{uri}: its ingredients are those of {found}"
    except (StorageError, ValueError, TypeError) as error:
        yield f"{uri}: cannot be read: {error}"


def verify_output(storage: Storage, output: str) -> Iterator[str]:
    """Yield the faults of an output's committed runs: lists, files, rows, and what readers see.

    Raises StartupError when a marker is broken: no list can be trusted then.
    """
    output = keys.plain(output)
    found, commits = list_output(output, storage)
    replaced = {uri for each in commits.values() for uri in each.replaced(output)}
    tables: dict[str, pa.Table] = {}
    for run_id, each in commits.items():
        for uri in sorted(each.listed(output) - replaced):
            if uri not in found:
                yield f"{join(output, run_id, COMMITTED)}: names {uri}, which does not exist"
            elif uri not in tables:
                try:
                    tables[uri] = _read(storage, uri)
                except (*UNREADABLE, StorageError) as error:
                    yield f"{uri}: cannot be read: {error}"
        if not each.listed(output) & replaced and each.listed(output) <= tables.keys():
            yield from _verify_counts(output, each, tables)
    yield from _verify_rows(tables)


def _read(storage: Storage, uri: str) -> pa.Table:
    schema = rows.ANSWERS if is_answers(uri) else rows.VIDEOS
    table = read_columns(storage, uri)
    if not set(table.column_names) <= set(schema.names):
        raise ValueError(f"its columns are {', '.join(table.column_names)}")
    return rows.completed(table, schema.names, schema).cast(schema)


def _verify_counts(output: str, each: Commit, tables: Mapping[str, pa.Table]) -> Iterator[str]:
    """Compare a marker's figures, and what its videos were asked, with the rows."""
    files = each.listed(output)
    answers = [tables[uri] for uri in files if is_answers(uri)]
    videos = [tables[uri] for uri in files if not is_answers(uri)]
    place = join(output, each.run_id, COMMITTED)
    for name, expected, parts in (
        ("answers", each.num_answers, answers),
        ("videos", each.num_videos, videos),
    ):
        length = sum(part.num_rows for part in parts)
        if length != expected:
            yield f"{place}: says {expected} {name}, its files have {length}"
    if each.replaces:
        return  # a compaction drops answers that are superseded, never a video
    asked = {
        (row["run_id"], row["video_key"]): row["num_prompts"]
        for part in videos
        for row in part.select(["run_id", "video_key", "num_prompts"]).to_pylist()
    }
    given = Counter(
        run_and_key
        for run_and_key, _ in {
            ((row["run_id"], row["video_key"]), row["prompt_id"])
            for part in answers
            for row in part.select(["run_id", "video_key", "prompt_id"]).to_pylist()
        }
    )
    # Answers of a video without a row are none: a run was killed between its two files.
    for run_and_key, num_prompts in sorted(asked.items()):
        if given[run_and_key] != num_prompts:
            yield (
                f"{place}: video {run_and_key[1]} was asked {num_prompts} prompts, it has "
                f"{given[run_and_key]} answers"
            )


def _verify_rows(tables: Mapping[str, pa.Table]) -> Iterator[str]:
    """Check that readers see each question once."""
    answers = [table for uri, table in sorted(tables.items()) if is_answers(uri)]
    table = pa.concat_tables([rows.ANSWERS.empty_table(), *answers])
    seen = seen_by_readers(table).select(["video_key", "prompt_id"]).to_pylist()
    times = Counter((row["video_key"], row["prompt_id"]) for row in seen)
    for (video_key, prompt_id), count in sorted(times.items()):
        if count != 1:
            yield f"readers see prompt {prompt_id} of video {video_key} {count} times"
