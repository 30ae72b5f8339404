"""Rows of more tables than the memory holds: many of them lie in the temporary folder."""

import io
import weakref
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.temporary import room, temporary_file

IN_MEMORY = 1 << 18  # rows; of those that say what has been answered, 0.1 GB

_PARTITIONS = 1024  # of 10^9 rows each has a million
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")

_Extent = tuple[int, int]  # where a table lies in the file, and its length


class SpilledRows:
    """Rows to be added table by table, then gone through any number of times, in their order.

    With `together`, the name of a text column, rows that have the same text come in one table:
    in that of all as long as they fit into memory, then in one of 1024.
    """

    def __init__(self, schema: pa.Schema, *, together: str | None = None) -> None:
        """Begin without rows."""
        self._schema = schema
        self._together = together
        self._length = 0
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._file: BinaryIO | None = None
        self._groups: list[list[_Extent]] = [[] for _ in range(_PARTITIONS if together else 0)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._length

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table of the schema."""
        self._length += table.num_rows
        self._num_waiting += table.num_rows
        self._waiting.append(table)
        if self._num_waiting >= IN_MEMORY:
            self._spill()

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the rows; without any, one empty table."""
        if self._file is None:
            yield self._take_waiting(keep=True)
            return
        if self._num_waiting:
            self._spill()
        for extents in self._groups:
            if extents:
                yield pa.concat_tables([self._read(*extent) for extent in extents])

    def _take_waiting(self, *, keep: bool) -> pa.Table:
        table = pa.concat_tables([self._schema.empty_table(), *self._waiting]).combine_chunks()
        self._waiting = [table] if keep else []
        return table

    def _spill(self) -> None:
        table = self._take_waiting(keep=False)
        self._num_waiting = 0
        if self._file is None:
            self._file = temporary_file()
            weakref.finalize(self, self._file.close)
        if self._together is None:
            self._groups.append([self._write(table)])
            return
        partition = _partitions(table.column(self._together))
        table = table.take(pa.array(np.argsort(partition, kind="stable")))
        lengths = np.bincount(partition, minlength=_PARTITIONS)
        starts = np.cumsum(lengths) - lengths
        for number in np.flatnonzero(lengths):
            part = table.slice(starts[number], lengths[number])
            self._groups[number].append(self._write(part))

    def _write(self, table: pa.Table) -> _Extent:
        assert self._file is not None
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema, options=_OPTIONS) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        with room():
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(data)
        return start, data.size

    def _read(self, start: int, length: int) -> pa.Table:
        assert self._file is not None
        self._file.seek(start)
        with pa.ipc.open_stream(self._file.read(length)) as reader:
            return reader.read_all()


def _partitions(texts: pa.ChunkedArray) -> npt.NDArray[np.uint16]:
    """Return the partition of each text: equal ones have the same."""
    found = (zlib.crc32((text or "").encode()) % _PARTITIONS for text in texts.to_pylist())
    return np.fromiter(found, np.uint16, len(texts))
