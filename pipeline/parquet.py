"""Read Parquet files through Storage, wherever they lie: only the ranges that are asked for.

Single-threaded: Arrow's own threads reading a Python file abort the interpreter now and then when
it ends (apache/arrow#34314, #50482). Many files are read side by side by threads of ours.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage, StorageError

_T = TypeVar("_T")

_READERS = 32  # files read at the same time: the wait is for the object store
# Files read ahead, lest what was read piles up: so many, and no more bytes unless it is one.
_AHEAD = 128
_AHEAD_BYTES = 64 << 20

# What reading damaged Parquet is known to raise; OSError is Arrow's word for a broken page. Not
# pa.ArrowException: shortage of memory is one, and a sound file would be given up for it.
UNREADABLE = (
    OSError,
    ValueError,  # pa.ArrowInvalid among them
    KeyError,
    pa.ArrowCapacityError,
    pa.ArrowIndexError,
    pa.ArrowNotImplementedError,
    pa.ArrowSerializationError,
    pa.ArrowTypeError,
)


def require_lost(error: Exception) -> None:
    """Raise an error that says nothing of the file: the store is away, or refuses.

    What is left is damage (UNREADABLE), or a file that is not there any more.
    """
    if isinstance(error, StorageError) and error.error_type != "not_found":
        raise error


@contextmanager
def open_parquet(storage: Storage, uri: str) -> Iterator[pq.ParquetFile]:
    """Open a file; page checksums, where it has them, are verified.

    Raises ValueError for columns of extension types: all of ours are plain, and reading the values
    of one of Ray's would unpickle them.
    """
    with storage.open(uri) as file:
        part = pq.ParquetFile(
            pa.PythonFile(file, mode="r"), pre_buffer=False, page_checksum_verification=True
        )
        for field in part.schema_arrow:
            if isinstance(field.type, pa.BaseExtensionType):
                message = f"{uri}: column {field.name} is {field.type}, not a plain type"
                raise ValueError(message)  # noqa: TRY004 (the file's fault, not the caller's)
        yield part


def read_columns(storage: Storage, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file, all of it or only `columns` (those it lacks are left out)."""
    names = None if columns is None else list(columns)
    with open_parquet(storage, uri) as part:
        return part.read(columns=names, use_threads=False)


def count_rows(storage: Storage, uri: str) -> int:
    """Return how many rows a file has, from its footer alone."""
    with open_parquet(storage, uri) as part:
        return int(part.metadata.num_rows)


def read_each(
    uris: Iterable[str], read: Callable[[str], _T], sizes: Mapping[str, int] | None = None
) -> Iterator[tuple[str, _T]]:
    """Yield each uri, in order, with what `read` makes of it; many are read side by side.

    With `sizes`, in bytes, few large ones are: where most of a file is read.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        for some in _ahead(uris, sizes or {}):
            yield from zip(some, pool.map(read, some), strict=True)


def _ahead(uris: Iterable[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    some: list[str] = []
    num_bytes = 0
    for uri in uris:
        size = sizes.get(uri, 0)
        if some and (len(some) == _AHEAD or num_bytes + size > _AHEAD_BYTES):
            yield some
            some, num_bytes = [], 0
        some.append(uri)
        num_bytes += size
    if some:
        yield some
