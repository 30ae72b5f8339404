"""Read Parquet files through Storage, wherever they lie: only the ranges that are asked for.

Single-threaded: Arrow's own threads reading a Python file abort the interpreter now and then when
it ends (apache/arrow#34314, #50482). Many files are read side by side by threads of ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage


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
