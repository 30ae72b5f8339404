"""Nights on which something breaks, then the same command again: every row is there, and once."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from pipeline.testing.s3_server import S3Server
from tests.chaos.fault_proxy import Shares, fault_proxy
from tests.chaos.night import NUM_VIDEOS, RUN_DEADLINE_S, Night, Seen, mend, names, table_line

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CHAOS_KILLS", "20"))  # of drivers, in nights of five


def _await_moment(
    night: Night, running: subprocess.Popen[bytes], moments: random.Random, typical_s: float
) -> None:
    """Return at a random time of the run, or right behind a random one of its writes."""
    if moments.random() < 0.3:
        with suppress(subprocess.TimeoutExpired):
            running.wait(moments.uniform(0.05, 0.8) * typical_s)
        return
    wanted = len(names(night)) + moments.randint(1, 3 * NUM_VIDEOS)
    deadline = time.monotonic() + RUN_DEADLINE_S
    while running.poll() is None and time.monotonic() < deadline and len(names(night)) < wanted:
        time.sleep(0.02)


def test_a_driver_that_is_killed_at_any_moment(
    start_night: Callable[..., Night],
    undisturbed: tuple[Seen, float],
    record_property: Callable[[str, object], None],
) -> None:
    expected, typical_s = undisturbed
    start = time.monotonic()
    moments = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        night = start_night()
        for _ in range(min(5, KILLS - kills)):
            running = night.start()
            began = time.monotonic()
            runs += 1
            _await_moment(night, running, moments, typical_s)
            ended = running.poll() is not None
            running.kill()
            running.wait()
            assert night.seen().items() <= expected.items()
            if ended:  # there is nothing left to be killed at: another night
                typical_s = min(typical_s, time.monotonic() - began)
                break
            kills += 1
        runs += mend(night, expected)
        assert night.faults() == []
    record_property(*table_line(f"driver kill -9, {kills} times", runs, expected, start))


def test_workers_that_are_killed(
    start_night: Callable[..., Night],
    undisturbed: tuple[Seen, float],
    record_property: Callable[[str, object], None],
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    night = start_night()
    choice = random.Random(0)
    killed = 0
    running = night.start()
    deadline = time.monotonic() + RUN_DEADLINE_S
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(choice.uniform(1, 5))
        assert night.cluster is not None
        workers = night.cluster.workers()
        if workers and killed < 8:
            with suppress(ProcessLookupError):
                os.kill(choice.choice(workers), signal.SIGKILL)
                killed += 1
    running.kill()
    running.wait()
    assert killed
    assert len(night.seen()) in (0, NUM_VIDEOS)  # the run was committed whole, or not at all
    runs = 1 + mend(night, expected)
    assert night.faults() == []
    record_property(*table_line(f"worker kill -9, {killed} times", runs, expected, start))


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("20 % 503", Shares(busy=0.2)),
        ("10 % connections reset", Shares(reset=0.1)),
        ("10 % bodies cut in half", Shares(cut=0.1)),
        ("10 % bodies stall for 5 s", Shares(slow=0.1, stall_s=5)),
        ("20 % 503, 10 % reset, 10 % cut", Shares(busy=0.2, reset=0.1, cut=0.1)),
    ],
)
def test_a_store_that_breaks_its_answers(
    name: str,
    shares: Shares,
    start_night: Callable[..., Night],
    undisturbed: tuple[Seen, float],
    s3: S3Server,
    record_property: Callable[[str, object], None],
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    with fault_proxy(s3.endpoint_url, seed=0, shares=shares) as proxy:
        night = start_night(endpoint_url=proxy.endpoint_url, arguments=("storage.timeout_s=2",))
        runs = mend(night, expected)
        counts, total = proxy.counts, proxy.counts.total()
    faults = total - counts[""]
    for fault in ("busy", "reset", "cut", "slow"):
        share = getattr(shares, fault)  # exact in each twenty, and the last may be incomplete
        assert abs(counts[fault] - share * total) <= 20 * share
    assert faults
    assert night.faults() == []
    record_property(*table_line(f"{name} ({faults} of {total})", runs, expected, start))
