"""A video that kills its worker ends as a failed row; its neighbours are done."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import DataContext

from pipeline import rows
from pipeline.pools import Pool
from pipeline.quarantine import Guarded, Ledger, guard, new_ledger


def test_a_worker_that_ends_what_it_begins_raises_no_suspicion() -> None:
    ledger = Ledger()
    for _ in range(5):
        assert ledger.begin("decode", ["a", "b"], alone=False) is None
        ledger.end("decode", ["a", "b"])


def test_only_who_was_alone_is_blamed() -> None:
    ledger = Ledger()
    assert ledger.begin("answer", ["a", "b"], alone=False) is None  # and the worker dies
    assert ledger.begin("answer", ["a", "b"], alone=False) == 0
    ledger.put_back("answer", ["a", "b"])
    assert ledger.begin("answer", ["a"], alone=True) == 0
    ledger.end("answer", ["a"])
    assert ledger.begin("answer", ["b"], alone=True) == 0  # and it dies again
    assert ledger.begin("answer", ["a", "b"], alone=False) == 1
    ledger.put_back("answer", ["a", "b"])
    assert ledger.begin("answer", ["a"], alone=True) is None
    ledger.end("answer", ["a"])
    assert ledger.begin("answer", ["b"], alone=True) == 1
    assert ledger.begin("decode", ["b"], alone=True) is None  # another stage is another matter


class _Lethal:
    """Kills its worker at the videos that are named so."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __call__(self, block: pa.Table) -> pa.Table:
        for row in rows.iterate(block):
            with self._log.open("a") as log:
                log.write(f"{row['uri']}\n")
            if row["uri"].startswith("poison") and row["error_type"] is None:
                os.kill(os.getpid(), signal.SIGKILL)
        return block


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("batch", "calls"), [(1, 1), (3, 1), (1, 2)])
def test_poison_fails_its_row_alone(tmp_path: Path, batch: int, calls: int) -> None:
    videos: list[dict[str, Any]] = [
        {"video_key": f"{n:064x}", "uri": f"{'poison' if n == 2 else 'sound'} {n}.mp4"}
        for n in range(5)
    ]
    log = tmp_path / "log"
    dataset = ray.data.from_arrow(rows.build(videos, rows.IDENTITY)).map_batches(
        Guarded,
        **guard(_Lethal, {"log": log}, new_ledger(), Pool(1, 0.5, calls=calls), batch),
    )
    done = sorted(dataset.take_all(), key=lambda row: row["video_key"])
    failures = [row["error_type"] for row in done]
    assert failures == [None, None, "worker_crash", None, None]
    assert done[2]["error_stage"] == "_lethal"
    assert "poison 2.mp4: 2 workers died" in done[2]["error_message"]
    assert rows.build(done, rows.IDENTITY).num_rows == len(videos)
    # Two deaths in which it was alone, one more if it was first met in company, one as a failure.
    in_company = batch > 1 or calls > 1
    assert log.read_text().count("poison") == (4 if in_company else 3)
