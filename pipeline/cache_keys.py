"""Key files of a token cache: the keys of many part files in one, so that runs open few files.

A part file has a row group for each video, so its footer alone is 2 KB a video: 10^7 videos would
be hours of requests. `jobs/compact.py` writes `keys-<uuid>.parquet`, a row for each part file, and
another one for every 4 million keys. They hold nothing that the part files do not: one that is lost
or broken costs time.
"""

import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import key_index
from pipeline.parquet import UNREADABLE, read_columns, read_each
from pipeline.storage import Storage, StorageError, join

log = logging.getLogger(__name__)

KEYS = pa.schema(
    [
        ("file", pa.string()),  # name of the part file, in the same folder
        ("video_key", pa.list_(pa.binary(32))),  # of its rows, in their order
        ("created_at", pa.list_(pa.timestamp("us", tz="UTC"))),
    ]
)

KEYS_A_FILE = 1 << 22  # read, and written, as a whole

# The keys of a part file's rows and when each was written, in microseconds, in their order.
FileKeys = tuple[key_index.Keys, key_index.Integers]


def read_keys(
    storage: Storage, folder: str, files: Sequence[str], key_files: Sequence[str]
) -> Iterator[tuple[str, FileKeys | None]]:
    """Yield each part file once, in any order, with its keys; None: it cannot be read.

    Those in a key file are not opened.
    """
    left = dict.fromkeys(files)
    for uri in key_files:
        for file, keys_of_file in (read_key_file(storage, folder, uri) or {}).items():
            if file in left:
                del left[file]
                yield file, keys_of_file
    yield from read_each(list(left), lambda uri: read_part(storage, uri))


def read_part(storage: Storage, uri: str) -> FileKeys | None:
    """Return the keys of a part file from itself; None: it cannot be read."""
    try:
        table = read_columns(storage, uri, ["video_key", "created_at"])
        if table.column_names != ["video_key", "created_at"]:
            raise ValueError("it has no video_key or no created_at")
        created = table.column("created_at").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
        found = key_index.from_hex(table.column("video_key").to_pylist())
        return found, np.asarray(created.fill_null(0), np.int64)
    except (*UNREADABLE, StorageError, TypeError) as error:
        log.warning("cache file %s cannot be read, its videos are misses: %s", uri, error)
        return None


def renew_keys(
    storage: Storage, folder: str, files: Sequence[str], key_files: Sequence[str]
) -> None:
    """Write the keys of the part files that no key file has; merge key files, delete what is old.

    One that is at least half full and names only part files that exist stays as it is.
    """
    left = set(files)
    replaced: dict[str, set[str]] = {}
    for uri in key_files:
        named = read_key_file(storage, folder, uri) or {}
        length = sum(len(keys_of_file) for keys_of_file, _ in named.values())
        if named and named.keys() <= left and length >= KEYS_A_FILE / 2:
            left -= named.keys()
        else:
            replaced[uri] = set(named)
    if left and list(replaced.values()) == [left]:
        return  # one says it all
    waiting: list[tuple[str, FileKeys]] = []
    num_keys = 0
    for uri, part in read_keys(storage, folder, sorted(left), list(replaced)):
        if part is not None:
            if waiting and num_keys + len(part[0]) > KEYS_A_FILE:
                write_keys(storage, folder, waiting)
                waiting, num_keys = [], 0
            waiting.append((uri, part))
            num_keys += len(part[0])
    if waiting:
        write_keys(storage, folder, waiting)
    for uri in replaced:
        storage.delete(uri)


def write_keys(storage: Storage, folder: str, files: Iterable[tuple[str, FileKeys]]) -> str:
    """Write one key file about `files`; return its uri."""
    names, lengths, keys, created = [], [0], [], []
    for uri, (keys_of_file, times) in files:
        names.append(uri.rpartition("/")[2])
        lengths.append(len(keys_of_file))
        keys.append(keys_of_file)
        created.append(times)
    offsets = pa.array(np.cumsum(lengths), pa.int32())
    data = np.concatenate([np.empty(0, key_index.KEY), *keys])
    values = pa.Array.from_buffers(pa.binary(32), len(data), [None, pa.py_buffer(data)])
    times = pa.array(np.concatenate([np.empty(0, np.int64), *created])).cast(
        pa.timestamp("us", tz="UTC")
    )
    table = pa.table(
        [
            pa.array(names, pa.string()),
            pa.ListArray.from_arrays(offsets, values),
            pa.ListArray.from_arrays(offsets, times),
        ],
        schema=KEYS,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        use_dictionary=False,  # no key is there twice
        compression="zstd",
        compression_level=1,
        write_statistics=False,
        write_page_checksum=True,
    )
    uri = join(folder, f"keys-{uuid.uuid4().hex}.parquet")
    storage.write(uri, sink.getvalue())
    return uri


def read_key_file(storage: Storage, folder: str, uri: str) -> dict[str, FileKeys] | None:
    """Return the keys that a key file has, by part file; None: it cannot be read."""
    try:
        table = read_columns(storage, uri, KEYS.names).cast(KEYS).combine_chunks()
    except (*UNREADABLE, StorageError) as error:
        log.warning("key file %s cannot be read, the part files are instead: %s", uri, error)
        return None
    if not table.num_rows:
        return {}
    keys, created = (table.column(name).chunk(0) for name in ("video_key", "created_at"))
    offsets = np.asarray(keys.offsets)
    # flatten() starts at the first row's offset
    flat = keys.flatten()
    all_keys = np.frombuffer(flat.buffers()[1], key_index.KEY, len(flat), 32 * flat.offset)
    times = np.asarray(created.flatten().cast(pa.int64()))
    starts, stops = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    return {
        join(folder, name): (all_keys[start:stop], times[start:stop])
        for name, start, stop in zip(table.column("file").to_pylist(), starts, stops, strict=True)
    }
