"""Videos that kill the worker they are in: noticed, tried alone, and given up as failed rows.

Ray starts a dead actor again and gives it the same rows, for ever: one video that exhausts the
memory of its machine would keep a whole corpus from its end. So each stage that works on media says
in a ledger which videos it begins and ends. One that was begun, alone, and never ended
as often as pipeline.retry says fails as `worker_crash`.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from pipeline import rows
from pipeline.pools import Pool
from pipeline.retry import MAX_DEATHS


class Ledger:
    """Know which videos were begun and not ended, by stage. A Ray actor: one for each run."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], bool] = {}  # whether it was begun alone
        self._suspects: set[tuple[str, str]] = set()
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._pieces: Counter[tuple[str, str]] = Counter()  # handed on by the longest try

    def begin(self, stage: str, video_keys: Sequence[str], *, alone: bool) -> int | None:
        """Note that a worker begins these videos; `alone`: it has nothing else in hand.

        Return None when there is no suspicion; else the most often that one of them was begun alone
        and its worker died.
        """
        own = [(stage, key) for key in video_keys]
        for video in own:
            if video in self._open:
                self._suspects.add(video)
                self._deaths[video] += self._open[video]
            self._open[video] = alone
        if self._suspects.isdisjoint(own):
            return None
        return max(self._deaths[video] for video in own)

    def put_back(self, stage: str, video_keys: Sequence[str]) -> None:
        """Note that these were not worked on after all; what is known of them stays."""
        for key in video_keys:
            self._open.pop((stage, key), None)

    def hand_on(self, stage: str, video_keys: Sequence[str], pieces: int) -> None:
        """Note that a worker is about to hand on so many pieces of these videos in all."""
        for key in video_keys:
            self._pieces[(stage, key)] = max(self._pieces[(stage, key)], pieces)

    def handed_on(self, stage: str, video_key: str) -> int:
        """Return how many pieces of a video have been handed on at most."""
        return self._pieces[(stage, video_key)]

    def end(self, stage: str, video_keys: Sequence[str]) -> None:
        """Note that a worker has done these videos."""
        for key in video_keys:
            self._pieces.pop((stage, key), None)
            self._open.pop((stage, key), None)
            self._suspects.discard((stage, key))
            self._deaths.pop((stage, key), None)


def new_ledger() -> Any:
    """Start the ledger of a run; it lives as long as the handle that is returned."""
    # Killed itself it comes back empty: a count begins anew.
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()


def guard(
    stage: type, arguments: dict[str, Any], ledger: Any, pool: Pool, batch_size: int
) -> dict[str, Any]:
    """Return what map_batches is told to run a stage as Guarded in a pool."""
    return {
        "fn_constructor_kwargs": {
            "stage": stage,
            "arguments": arguments,
            "ledger": ledger,
            "overlaps": pool.calls > 1,
        },
        **pool.of(batch_size),
    }


class _Gate:
    """Let the calls of a worker in together, or one in alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._changed = threading.Condition()

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._inside)
            yield  # the lock is kept: nobody else gets in


class Guarded:
    """Run a stage with the ledger: its columns are those of the stage."""

    def __init__(
        self, stage: type, arguments: dict[str, Any], ledger: Any, *, overlaps: bool = False
    ) -> None:
        """Make the stage; `ledger` is what new_ledger returned."""
        self._stage = stage(**arguments)
        self._overlaps = overlaps
        self._gate = _Gate()
        self._name = stage.__name__.lower()
        self._ledger = ledger

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Yield what the stage makes of a block; after a death, of each of its rows alone."""
        video_keys = block.column("video_key").to_pylist()
        with self._gate.together():
            alone = len(video_keys) == 1 and not self._overlaps
            deaths = ray.get(self._ledger.begin.remote(self._name, video_keys, alone=alone))
            if deaths is None:
                yield from self._run(block, video_keys)
                ray.get(self._ledger.end.remote(self._name, video_keys))
                return
        ray.get(self._ledger.put_back.remote(self._name, video_keys))
        for row, key in enumerate(video_keys):
            yield from self._alone(key, block.slice(row, 1))

    def _run(self, block: pa.Table, video_keys: Sequence[str]) -> Iterator[pa.Table]:
        """Yield what the stage returns, all at once or piece by piece."""
        done = self._stage(block)
        if isinstance(done, pa.Table):
            yield done
            return
        for pieces, piece in enumerate(done, start=1):
            ray.get(self._ledger.hand_on.remote(self._name, video_keys, pieces))
            yield piece

    def _alone(self, video_key: str, row: pa.Table) -> Iterator[pa.Table]:
        with self._gate.alone():
            deaths = ray.get(self._ledger.begin.remote(self._name, [video_key], alone=True)) or 0
            if deaths < MAX_DEATHS:
                yield from self._run(row, [video_key])
            else:
                yield from self._give_up(video_key, row, deaths)
            ray.get(self._ledger.end.remote(self._name, [video_key]))

    def _give_up(self, video_key: str, row: pa.Table, deaths: int) -> Iterator[pa.Table]:
        """Yield the pieces that earlier tries handed on, then the failure of what is left.

        Ray has these pieces, and takes the first that a repeated task yields for them: a failure
        alone would be lost. Where even they are deadly by now, it is tried no more.
        """
        pieces = ray.get(self._ledger.handed_on.remote(self._name, video_key))
        if pieces and deaths < 2 * MAX_DEATHS:
            for piece in islice(self._run(row, [video_key]), pieces):
                yield piece
                windows = piece.column("windows")[0].as_py() or 1
            if pieces == windows:
                return  # it had done all there is, and died behind it
        failed = self._failed(row, deaths)
        yield from self._run(failed, [video_key])  # which the stage passes on untouched

    def _failed(self, row: pa.Table, deaths: int) -> pa.Table:
        [video] = rows.iterate(row)
        message = (
            f"{video['uri']}: {deaths} workers died while they had it in {self._name}; look for "
            "the reason in Ray's logs (often the memory of the machine), transcode or remove it"
        )
        return rows.build([rows.failed(video, self._name, "worker_crash", message)], row.schema)
