"""The store of kept tokens: `<cache>/<fingerprint>/part-*.parquet`, and the index of its keys.

One row group holds one video, so that one video is read alone. A row found damaged is named in a
tombstone, `bad-<uuid>.json`: the index then leaves it out, and the next run computes it again.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import cache_keys, key_index, keys, rows
from pipeline.errors import StartupError
from pipeline.storage import Storage, StorageError, join

log = logging.getLogger(__name__)

# A place in the index: the number of the file, then 32 bits of the number of the row.
_ROW_BITS = 32
_ROW = (1 << _ROW_BITS) - 1

Integers = key_index.Integers

# A row of the work list whose tokens are cached, and where they lie; null in a failed row.
HITS = pa.schema([*rows.IDENTITY, ("cache_file", pa.string()), ("cache_row", pa.int32())])


def digest(row: Mapping[str, Any]) -> str:
    """Return the sha256 of what the answering model reads of a row of rows.KEPT or rows.CACHED.

    Over tokens, positions, modality, next_position and kept_index, behind a line that says the
    token type and every length, so that no two rows share their bytes. Integers little endian.
    Raises TypeError when one of them is null.
    """
    positions = row["positions"]
    lengths = [len(row["modality"]), len(row["kept_index"]), *(len(axis) for axis in positions)]
    head = [row["token_dtype"], list(row["token_shape"]), int(row["next_position"]), lengths]
    sha = hashlib.sha256(json.dumps(head).encode())
    sha.update(row["tokens"])
    sha.update(np.asarray(row["modality"], "u1").tobytes())
    for integers in (row["kept_index"], *positions):
        sha.update(np.asarray(integers, "<i4").tobytes())
    return sha.hexdigest()


def write_fingerprint(
    storage: Storage, folder: str, ingredients: Mapping[str, keys.Ingredient]
) -> None:
    """Write the readable ingredients beside the tokens, once. `folder` is <cache>/<fingerprint>.

    The first write of a job into the cache: one that is refused is a StartupError.
    """
    assert folder.endswith(keys.fingerprint(ingredients)), "the folder is of other ingredients"
    uri = join(folder, "fingerprint.json")
    text = json.dumps(dict(ingredients), indent=2, sort_keys=True) + "\n"
    try:
        if not storage.exists(uri):
            storage.write(uri, text.encode())
    except StorageError as error:
        raise StartupError(f"cache.path: the token cache cannot be written: {error}") from error


def write_part(storage: Storage, folder: str, run_id: str, block: pa.Table) -> str:
    """Write the rows of `block` (rows.KEPT, none failed) as one durable file; return its uri."""
    own = {
        "sha256": pa.array([digest(row) for row in rows.iterate(block)], pa.string()),
        "run_id": pa.array([run_id] * block.num_rows, pa.string()),
        "created_at": pa.array([datetime.now(UTC)] * block.num_rows, pa.timestamp("us", tz="UTC")),
    }
    columns = [own[name] if name in own else block.column(name) for name in rows.CACHED.names]
    uri = join(folder, f"part-{run_id}-{uuid.uuid4().hex}.parquet")
    write_rows(storage, uri, [pa.table(columns, schema=rows.CACHED)])
    return uri


def write_rows(storage: Storage, uri: str, tables: Iterable[pa.Table]) -> int:
    """Write rows of rows.CACHED as they stand as one file, a row group each; return their number.

    Without rows nothing is written.
    """
    num_rows = 0
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        rows.CACHED,
        # bfloat16 tokens shrink to 78 %: level 1 finds all of it, at 200 MB/s on one core.
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=["video_key", "created_at"],
        write_page_checksum=True,
    ) as writer:
        for table in tables:
            num_rows += table.num_rows
            writer.write_table(table, row_group_size=1)
    if num_rows:
        storage.write(uri, sink.getvalue())
    return num_rows


def read_row(part: pq.ParquetFile, row: int) -> pa.Table:
    """Return row `row` of a file of the cache as a table of one row, verified.

    Raises one of UNREADABLE when the bytes are not those that were written.
    """
    skipped = 0
    for group in range(part.metadata.num_row_groups):
        length = part.metadata.row_group(group).num_rows
        if row < skipped + length:
            table = (
                part.read_row_group(group, use_threads=False)
                .slice(row - skipped, 1)
                .select(rows.CACHED.names)
            )
            _verify(table)
            return table.cast(rows.CACHED)
        skipped += length
    raise ValueError(f"the file has {skipped} rows, row {row} is not among them")


def _verify(table: pa.Table) -> None:
    row = next(rows.iterate(table))
    try:
        found = digest(row)
    except TypeError as error:
        raise ValueError(f"a column is null: {error}") from error
    if found != row["sha256"]:
        raise ValueError(f"sha256 is {found}, {row['sha256']} was written")


class Location(NamedTuple):
    """Where the kept tokens of a video lie."""

    file: str
    row: int


def bury(storage: Storage, uri: str, row: int, *, video_key: str, reason: str) -> None:
    """Leave a tombstone, so that the index never offers this damaged row again."""
    folder = uri.rpartition("/")[0]
    bury_all(storage, folder, [(video_key, Location(uri, row))], reason=reason)


def bury_all(
    storage: Storage, folder: str, places: Iterable[tuple[str, Location]], *, reason: str
) -> None:
    """Leave one tombstone for rows of `folder`, each with its video's key."""
    buried = [
        {"file": place.file.rpartition("/")[2], "row": place.row, "video_key": video_key}
        for video_key, place in places
    ]
    text = json.dumps({"reason": reason, "rows": buried}, indent=1) + "\n"
    storage.write(join(folder, f"bad-{uuid.uuid4().hex}.json"), text.encode())


@dataclass(frozen=True)
class Folder:
    """What lies in `<cache>/<fingerprint>`, by uri."""

    files: tuple[str, ...]
    tombstones: tuple[str, ...]
    key_files: tuple[str, ...]


class CacheIndex:
    """Know which videos have kept tokens, and where; any number of them, see pipeline.key_index.

    Only the key and the time of each row are read. Of equal keys the latest row counts. A file
    that cannot be read is in `unreadable`, and its videos are misses.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        """Read the index of `<cache>/<fingerprint>`; a folder that does not exist is empty."""
        folder = keys.plain(folder)
        parts = list_folder(storage, folder)
        self._files = parts.files
        self._lengths: Integers = np.zeros(len(parts.files), np.int64)
        self.unreadable: list[str] = []
        self._index = key_index.KeyIndex(self._read(storage, folder, parts))

    def _read(self, storage: Storage, folder: str, parts: Folder) -> Iterator[key_index.Entries]:
        numbers = {uri: number for number, uri in enumerate(self._files)}
        buried: dict[str, set[int]] = {}
        for places in read_tombstones(storage, folder, parts.tombstones).values():
            for uri, row in places:
                buried.setdefault(uri, set()).add(row)
        for uri, part in cache_keys.read_keys(storage, folder, parts.files, parts.key_files):
            if part is None:
                self.unreadable.append(uri)
                continue
            video_keys, created = part
            self._lengths[numbers[uri]] = len(video_keys)
            rows_here = np.arange(len(video_keys))
            if uri in buried:
                rows_here = np.setdiff1d(rows_here, np.array(list(buried[uri])))
            # Of rows of one moment the one in the file whose name sorts behind counts.
            places_here = (numbers[uri] << _ROW_BITS) + rows_here
            yield key_index.entries(video_keys[rows_here], places_here, created[rows_here])

    def __len__(self) -> int:
        """Return the number of videos with kept tokens."""
        return len(self._index)

    def rows_of_files(self) -> Iterator[tuple[str, int, Integers]]:
        """Yield each readable file, its length and the numbers of the rows that count.

        The others are superseded by a later row of the same key, or buried by a tombstone.
        """
        starts = np.cumsum(self._lengths) - self._lengths
        counts = np.zeros(int(self._lengths.sum()), np.bool_)
        for places in self._index.places():
            counts[starts[places >> _ROW_BITS] + (places & _ROW)] = True
        unreadable = set(self.unreadable)
        for uri, start, length in zip(self._files, starts, self._lengths, strict=True):
            if uri not in unreadable:
                yield uri, int(length), np.flatnonzero(counts[start : start + length])

    def locate(self, video_keys: Sequence[str]) -> list[Location | None]:
        """Return where each video's tokens lie; None: a miss."""
        places = self._index.find(key_index.from_hex(list(video_keys)))
        found = zip((places >> _ROW_BITS).tolist(), (places & _ROW).tolist(), strict=True)
        return [Location(self._files[file], row) if file >= 0 else None for file, row in found]


def find_folders(storage: Storage, root: str) -> list[str]:
    """Return every `<cache>/<fingerprint>` below a cache; one that does not exist has none."""
    root = keys.plain(root)
    folders = set()
    try:
        for info in storage.list(root, suffixes=(".parquet", ".json")):
            folder, _, name = info.uri[len(root) + 1 :].partition("/")
            if name and "/" not in name and not folder.startswith("."):
                folders.add(join(root, folder))
    except StorageError as error:
        if error.error_type != "not_found":
            raise StartupError(f"cache: the token cache cannot be read: {error}") from error
    return sorted(folders)


def list_folder(storage: Storage, folder: str) -> Folder:
    """List the part files, tombstones and key files of `<cache>/<fingerprint>`."""
    found: dict[str, list[str]] = {"part-": [], "bad-": [], "keys-": []}
    try:
        for info in storage.list(folder, suffixes=(".parquet", ".json")):
            prefix = info.uri.rpartition("/")[2].partition("-")[0] + "-"
            if prefix in found and info.uri.endswith(".json") == (prefix == "bad-"):
                found[prefix].append(info.uri)
    except StorageError as error:
        if error.error_type != "not_found":
            raise StartupError(f"cache.path: the token cache cannot be read: {error}") from error
    return Folder(*(tuple(uris) for uris in found.values()))


def read_tombstones(
    storage: Storage, folder: str, tombstones: Iterable[str]
) -> dict[str, list[tuple[str, int]]]:
    """Return the files and rows that each tombstone buries; a broken one is left out."""
    buried = {}
    for uri in tombstones:
        try:
            places = json.loads(storage.read(uri))["rows"]
            buried[uri] = [(join(folder, place["file"]), int(place["row"])) for place in places]
        except (StorageError, ValueError, KeyError, TypeError) as error:
            # Harmless: the damaged row is offered, found damaged and buried once more.
            log.warning("tombstone %s cannot be read: %s", uri, error)
    return buried
