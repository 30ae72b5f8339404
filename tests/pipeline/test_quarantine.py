"""A video that kills its worker ends as a failed row; its neighbours are done."""

import logging
import os
import signal
import time
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
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
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


class _LethalWindows:
    """Makes four pieces of each video; kills its worker in the last of those that are named so."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for row in rows.iterate(block):
            if row["error_type"]:
                yield rows.build([row], rows.DECODED)
                continue
            with self._log.open("a") as log:
                log.write(f"{row['uri']}\n")
            tries = self._log.read_text().split("\n").count(row["uri"])
            for number in range(4):
                if number == 3 and (row["uri"] == "poison" or (row["uri"], tries) == ("once", 1)):
                    time.sleep(1)  # what went before is handed on
                    os.kill(os.getpid(), signal.SIGKILL)
                name = f"{row['uri']} {number}"
                piece = {**row, "video_key": name, "windows": 4, "frames": bytes(2 << 20)}
                yield rows.build([piece], rows.DECODED)


def _without_frames(block: pa.Table) -> pa.Table:
    return block.drop_columns(["frames"])


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("block_bytes", [1 << 20, 64 << 20])
def test_windows_that_went_on_before_a_death_do_not_swallow_the_failure(
    tmp_path: Path, block_bytes: int
) -> None:
    """Ray counts what a repeated task yields: a failure in place of a window would be lost."""
    context = DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, block_bytes
    try:
        names = ["a", "poison", "once", "b"]
        videos = [rows.build([{"video_key": n, "uri": n}], rows.IDENTITY) for n in names]
        stage = guard(_LethalWindows, {"log": tmp_path / "log"}, new_ledger(), Pool(1, 0.5), 1)
        dataset = ray.data.from_arrow(videos).map_batches(Guarded, **stage)
        light = dataset.map_batches(
            _without_frames, batch_size=None, batch_format="pyarrow", num_cpus=0.1
        )
        done = {(row["video_key"], row["error_type"]) for row in light.take_all()}
    finally:
        context.target_max_block_size = before
    whole = {(f"{name} {number}", None) for name in ("a", "once", "b") for number in range(4)}
    poison = {(f"poison {number}", None) for number in range(3)} | {("poison", "worker_crash")}
    assert done == whole | poison
