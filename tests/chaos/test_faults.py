"""Nights on which something breaks, then the same command again: every row is there, and once."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from omnisift.mini.tiny import write_tiny_model
from pipeline.answers import read_answers
from pipeline.config import StorageConfig
from pipeline.storage import Storage, StorageError
from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server
from pipeline.token_cache import find_folders
from pipeline.verify import verify_cache, verify_output
from tests.chaos.fault_proxy import Shares, fault_proxy
from tests.ray_cluster import Cluster, local_cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("CHAOS_KILLS", "20"))  # of drivers, in nights of five
_RUN_DEADLINE_S = 300.0
_RUNS = 8  # in which a night must be mended
CLIPS = {
    "carphone.mp4": [f"a/carphone {n}.mp4" for n in range(5)],
    "h264_sound.mp4": ["ünïcode/h264_sound.mp4"],
    "truncated.mp4": ["broken/truncated.mp4"],
    "page.mp4": ["broken/page.mp4"],
}
FAILED = {"broken/truncated.mp4": "truncated", "broken/page.mp4": "not_a_video"}
NUM_VIDEOS = sum(map(len, CLIPS.values()))
STORAGE = Storage(StorageConfig())

Seen = dict[str, tuple[str, str]]  # by name: the status, and the text or the error_type


@dataclass(frozen=True)
class Night:
    """A corpus, and a job over it that may be started any number of times."""

    cluster: Cluster
    bucket: str
    model: Path
    output: str
    log: Path
    endpoint_url: str = ""

    def start(self) -> subprocess.Popen[bytes]:
        """Start the job, always by the same command."""
        arguments = [
            f"source=s3://{self.bucket}/videos",
            f"output={self.output}",
            f"model={self.model}",
            "media.min_pixels=3136",
            "media.max_pixels=12544",
            "answer.max_new_tokens=4",
            "answer.system_prompt=See and hear.",
            "answer.videos_per_file=2",
            "answer.batch_videos=2",
            "cache.videos_per_file=1",
            "pools.decode_actors=1",
            f"storage.endpoint_url={self.endpoint_url}",
        ]
        environment = {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / "caption_corpus.py"), *arguments],
                env={**environment, "PYTHONWARNINGS": "ignore"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def run(self) -> int:
        """Run the job to its end; return its exit status."""
        running = self.start()
        try:
            return running.wait(_RUN_DEADLINE_S)
        finally:
            running.kill()
            running.wait()

    def seen(self) -> Seen:
        """Return what readers see; nothing is there twice, at any moment."""
        found = read_answers(self.output, STORAGE).to_pylist()
        prefix = f"s3://{self.bucket}/videos/"
        seen = {
            row["uri"].removeprefix(prefix): (row["status"], row["text"] or row["error_type"])
            for row in found
        }
        assert len(seen) == len(found)
        return seen

    def faults(self) -> list[str]:
        """Return what jobs/verify.py would say."""
        faults = list(verify_output(STORAGE, self.output))
        for folder in find_folders(STORAGE, f"{self.output}/cache"):
            faults += verify_cache(STORAGE, folder)
        return faults

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


@pytest.fixture(scope="module")
def start_night(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Night]]:
    """A bucket of clips, and one cluster for all nights."""
    folder = tmp_path_factory.mktemp("chaos")
    client, bucket = s3.client(), f"chaos-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    for clip, path in render(folder / "clips", list(CLIPS)).items():
        for name in CLIPS[clip]:
            client.upload_file(str(path), bucket, f"videos/{name}")
    model = write_tiny_model(folder / "model", selector=True)
    before = dict(os.environ)
    os.environ.update(s3.environment)  # for the cluster's workers too
    try:
        with local_cluster(num_cpus=3) as cluster:

            def start(**changes: Any) -> Night:
                name = uuid.uuid4().hex[:8]
                log = folder / f"{name}.log"
                return Night(cluster, bucket, model, f"s3://{bucket}/{name}", log, **changes)

            yield start
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def undisturbed(start_night: Callable[..., Night]) -> tuple[Seen, float]:
    """What readers see, and the seconds it took, when nothing breaks."""
    night = start_night()
    start = time.monotonic()
    assert night.run() == 0, night.tail()
    seen = night.seen()
    assert len(seen) == NUM_VIDEOS
    assert {name: what for name, (status, what) in seen.items() if status == "failed"} == FAILED
    return seen, time.monotonic() - start


def _table_line(fault: str, runs: int, seen: Seen, start: float) -> tuple[str, str]:
    spent = time.monotonic() - start
    rows = len(seen)  # Night.seen refuses what is there twice
    return "chaos", f"{fault:<44}{runs:>5}{NUM_VIDEOS:>10}{rows:>6}{rows:>10}{spent:>6.0f}"


def _mend(night: Night, expected: Seen) -> int:
    """Run the same command until every video has the answer of a good night; return the runs."""
    for runs in range(1, _RUNS + 1):
        night.run()
        if night.seen() == expected:
            return runs
    pytest.fail(f"after {_RUNS} runs: {night.seen()}, wanted {expected}\n{night.tail()}")


def _await_moment(
    night: Night, running: subprocess.Popen[bytes], moments: random.Random, typical_s: float
) -> None:
    """Return at a random time of the run, or right behind a random one of its writes."""
    if moments.random() < 0.3:
        with suppress(subprocess.TimeoutExpired):
            running.wait(moments.uniform(0.05, 0.8) * typical_s)
        return
    wanted = _num_objects(night) + moments.randint(1, 3 * NUM_VIDEOS)
    deadline = time.monotonic() + _RUN_DEADLINE_S
    while running.poll() is None and time.monotonic() < deadline and _num_objects(night) < wanted:
        time.sleep(0.02)


def _num_objects(night: Night) -> int:
    try:
        return sum(1 for _ in STORAGE.list(night.output))
    except StorageError as error:
        if error.error_type != "not_found":
            raise
        return 0


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
        runs += _mend(night, expected)
        assert night.faults() == []
    record_property(*_table_line(f"driver kill -9, {kills} times", runs, expected, start))


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
    deadline = time.monotonic() + _RUN_DEADLINE_S
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(choice.uniform(1, 5))
        workers = night.cluster.workers()
        if workers and killed < 8:
            with suppress(ProcessLookupError):
                os.kill(choice.choice(workers), signal.SIGKILL)
                killed += 1
    running.kill()
    running.wait()
    assert killed
    assert len(night.seen()) in (0, NUM_VIDEOS)  # the run was committed whole, or not at all
    runs = 1 + _mend(night, expected)
    assert night.faults() == []
    record_property(*_table_line(f"worker kill -9, {killed} times", runs, expected, start))


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("20 % 503", Shares(busy=0.2, reset=0, cut=0)),
        ("10 % connections reset", Shares(busy=0, reset=0.1, cut=0)),
        ("10 % bodies cut in half", Shares(busy=0, reset=0, cut=0.1)),
        ("20 % 503, 10 % reset, 10 % cut", Shares()),
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
        night = start_night(endpoint_url=proxy.endpoint_url)
        runs = _mend(night, expected)
        faults = proxy.counts.total() - proxy.counts[""]
        total = proxy.counts.total()
    # Of about 100 requests a share of 10 % hits 10 give or take 6: only none would be a fault.
    assert 0 < faults < total
    assert night.faults() == []
    record_property(*_table_line(f"{name} ({faults} of {total})", runs, expected, start))
