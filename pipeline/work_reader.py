"""Bring the work list into Ray Data in blocks of a few videos each."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.parquet import count_rows, read_columns
from pipeline.storage import Storage

_MAX_BLOCKS = 20_000  # of a run: each is a task the driver keeps track of
_READ_CPUS = 0.1  # a read is small; a whole CPU of a small cluster would starve the actors


class _WorkReader(Datasource):
    """One read task, and so one block, for every few rows of the part files.

    `read_parquet` needs a CPU to list files and another to repartition, which a small cluster
    full of actors never has.
    """

    def __init__(self, storage: Storage, files: Iterable[str], rows_per_block: int) -> None:
        self._tasks: list[tuple[str, int, int]] = []
        for file in files:
            total = count_rows(storage, file)
            starts = range(0, total, rows_per_block)
            self._tasks += [(file, start, min(rows_per_block, total - start)) for start in starts]
        self._storage = storage

    def get_name(self) -> str:
        """Return what progress and statistics call the operator."""
        return "WorkList"

    def __len__(self) -> int:
        return len(self._tasks)

    def estimate_inmemory_data_size(self) -> None:
        """Tell nothing: the rows are names, what they grow to is known behind decode."""
        return

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 (fixed by the rows of a block)
        per_task_row_limit: int | None = None,
        data_context: Any = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """Return the tasks; each reads its rows alone."""
        return [
            ReadTask(
                partial(_read_rows, self._storage, file, start, length),
                BlockMetadata(num_rows=length, size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for file, start, length in self._tasks
        ]


def _read_rows(storage: Storage, file: str, start: int, length: int) -> list[pa.Table]:
    return [read_columns(storage, file).slice(start, length)]


def read_work(
    storage: Storage, files: Iterable[str], *, num_rows: int, num_actors: int
) -> ray.data.Dataset:
    """Read part files of a work list as a dataset.

    Blocks are small enough that each of the `num_actors` of the next stage gets several, and
    large enough that the driver can keep count of them.
    """
    rows_per_block = min(16, num_rows // (4 * num_actors))
    rows_per_block = max(1, rows_per_block, math.ceil(num_rows / _MAX_BLOCKS))
    reader = _WorkReader(storage, files, rows_per_block)
    dataset: ray.data.Dataset = ray.data.read_datasource(
        reader, override_num_blocks=len(reader), num_cpus=_READ_CPUS
    )
    return dataset
