"""A corpus on the S3 server, and a job over it that is started again and again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.answers import read_answers
from pipeline.config import StorageConfig
from pipeline.storage import Storage, StorageError
from pipeline.token_cache import find_folders
from pipeline.verify import verify_cache, verify_output
from tests.ray_cluster import Cluster

ROOT = Path(__file__).parents[2]
RUN_DEADLINE_S = 600.0
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

    cluster: Cluster | None  # None: Ray of its own, whose workers have `environment`
    bucket: str
    model: Path
    output: str
    log: Path
    endpoint_url: str = ""
    videos: str = "videos"  # prefix of the corpus
    cache: str = ""
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, *, new_session: bool = False) -> subprocess.Popen[bytes]:
        """Start the job, always by the same command."""
        arguments = [
            f"source=s3://{self.bucket}/{self.videos}",
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
            f"cache.path={self.cache}",
            *self.arguments,
        ]
        if self.cluster is None:
            environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
        else:
            environment = {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / "caption_corpus.py"), *arguments],
                env={**environment, "PYTHONWARNINGS": "ignore", **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=new_session,
            )

    def run(self) -> int:
        """Run the job to its end, or kill it when it takes too long; return its exit status."""
        running = self.start()
        try:
            return running.wait(RUN_DEADLINE_S)
        except subprocess.TimeoutExpired:  # of a busy machine: one more death, for the next run
            return -signal.SIGKILL
        finally:
            running.kill()
            running.wait()

    def seen(self) -> Seen:
        """Return what readers see; nothing is there twice, at any moment."""
        found = read_answers(self.output, STORAGE).to_pylist()
        prefix = f"s3://{self.bucket}/{self.videos}/"
        seen = {
            row["uri"].removeprefix(prefix): (row["status"], row["text"] or row["error_type"])
            for row in found
        }
        assert len(seen) == len(found)
        return seen

    def faults(self) -> list[str]:
        """Return what jobs/verify.py would say."""
        faults = list(verify_output(STORAGE, self.output))
        for folder in find_folders(STORAGE, self.cache or f"{self.output}/cache"):
            faults += verify_cache(STORAGE, folder)
        return faults

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def table_line(
    fault: str, runs: int, seen: Seen, start: float, *, num_videos: int = NUM_VIDEOS
) -> tuple[str, str]:
    spent = time.monotonic() - start
    rows = len(seen)  # Night.seen refuses what is there twice
    return "chaos", f"{fault:<44}{runs:>5}{num_videos:>10}{rows:>6}{rows:>10}{spent:>6.0f}"


def mend(night: Night, expected: Seen) -> int:
    """Run the same command until every video has the answer of a good night; return the runs."""
    for runs in range(1, _RUNS + 1):
        night.run()
        if night.seen() == expected:
            return runs
    pytest.fail(f"after {_RUNS} runs: {night.seen()}, wanted {expected}\n{night.tail()}")


def wait_for(what: str, is_so: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    """Return when something has come about in a run; fail when the run ends first."""
    deadline = time.monotonic() + RUN_DEADLINE_S
    while not is_so():
        assert running.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in {RUN_DEADLINE_S:.0f} s"
        time.sleep(0.02)


def names(night: Night) -> list[str]:
    """Return the uris of all objects of an output."""
    try:
        return [info.uri for info in STORAGE.list(night.output)]
    except StorageError as error:
        if error.error_type != "not_found":
            raise
        return []
