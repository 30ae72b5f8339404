"""The cache: kept tokens become durable, or are read instead of being computed again."""

import logging
import time
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import rows, token_cache
from pipeline.parquet import UNREADABLE, open_parquet
from pipeline.storage import Storage, StorageError

log = logging.getLogger(__name__)

_HEAVY = ("tokens", "positions", "modality", "kept_index")  # as long as the video


class WriteCache:
    """Make the kept tokens of a block durable, one file a block, before the rows move on.

    Reads: the columns of rows.KEPT. Writes: cache_s, the row's share of the seconds; cache_hit.
    A StorageError stops the job: without a cache each rerun would pay for the same tokens again.
    """

    def __init__(self, storage: Storage, folder: str, run_id: str, *, hand_on: bool = True) -> None:
        """Take the cache's folder, `<cache>/<fingerprint>`.

        With `hand_on=False` the rows move on without their tokens, where nobody asks for them.
        """
        self._hand_on = hand_on
        self._storage = storage
        self._folder = folder
        self._run_id = run_id

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block; failed rows are not cached, and nothing is written for them alone."""
        kept = [error is None for error in block.column("error_type").to_pylist()]
        if not any(kept):
            return block.select(rows.KEPT.names)
        start = time.perf_counter()
        whole = block if all(kept) else block.filter(pa.array(kept))
        token_cache.write_part(self._storage, self._folder, self._run_id, whole)
        cache_s = (time.perf_counter() - start) / sum(kept)
        own = {
            "cache_s": pa.array([cache_s if ok else None for ok in kept], pa.float64()),
            "cache_hit": pa.array([False if ok else None for ok in kept], pa.bool_()),
        }
        if not self._hand_on:
            own |= {name: pa.nulls(block.num_rows, rows.KEPT.field(name).type) for name in _HEAVY}
        columns = [own[name] if name in own else block.column(name) for name in rows.KEPT.names]
        return pa.table(columns, schema=rows.KEPT)


class ReadCache:
    """Fetch the kept tokens of videos that an earlier run compressed.

    Reads: cache_file, cache_row (see token_cache.HITS). Writes: the columns of rows.KEPT,
    cache_hit, cache_s. Every row is verified. Cached and fresh rows meet only in front of `answer`,
    so a damaged row cannot be decoded in the same run: it fails as cache_corrupt and leaves a
    tombstone, and the next run, by the same command, computes it again. A file that cannot be
    reached fails its rows with the storage's error_type and leaves none.
    """

    def __init__(self, storage: Storage) -> None:
        """Take the storage; where the rows lie, each row says itself."""
        self._storage = storage

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return one row of rows.KEPT for each row of token_cache.HITS."""
        found = [rows.KEPT.empty_table()]
        for file, group in groupby(rows.iterate(block), key=lambda row: row["cache_file"]):
            hits = list(group)
            found += self._of_file(file, hits) if file else [rows.build(hits, rows.KEPT)]
        return pa.concat_tables(found)

    def _of_file(self, file: str, hits: list[dict[str, Any]]) -> list[pa.Table]:
        try:
            with open_parquet(self._storage, file) as part:
                return [self._of_row(part, hit) for hit in hits]
        except (StorageError, *UNREADABLE) as error:
            return [self._failed(hit, error) for hit in hits]

    def _of_row(self, part: pq.ParquetFile, hit: dict[str, Any]) -> pa.Table:
        start = time.perf_counter()
        try:
            found = token_cache.read_row(part, hit["cache_row"])
            if found.column("video_key")[0].as_py() != hit["video_key"]:
                raise ValueError("the row is of another video")
        except (StorageError, *UNREADABLE) as error:
            return self._failed(hit, error)
        own = {
            **{name: hit[name] for name in rows.IDENTITY.names},
            "cache_s": time.perf_counter() - start,
            "cache_hit": True,
        }
        # Column by column, since rows.build would copy the tokens.
        stored = set(found.column_names) - set(own)
        columns = [
            found.column(field.name)
            if field.name in stored
            else pa.array([own.get(field.name)], field.type)
            for field in rows.KEPT
        ]
        return pa.table(columns, schema=rows.KEPT)

    def _failed(self, hit: dict[str, Any], error: Exception) -> pa.Table:
        if isinstance(error, StorageError):
            return rows.build([rows.failed(hit, "cache", error.error_type, str(error))], rows.KEPT)
        file, place = hit["cache_file"], hit["cache_row"]
        message = (
            f"{hit['uri']}: its cached tokens in {file}, row {place}, are damaged ({error}); "
            "run the same command again to compute them anew"
        )
        log.warning(message)
        key = hit["video_key"]
        token_cache.bury(self._storage, file, place, video_key=key, reason=str(error))
        return rows.build([rows.failed(hit, "cache", "cache_corrupt", message)], rows.KEPT)
