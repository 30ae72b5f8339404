"""A thousand clips in one run: after the first hundred nothing grows any more."""

import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from omnisift.mini.tiny import write_tiny_model
from pipeline.testing.clips import encode
from tests.chaos.night import Night, table_line
from tests.ray_cluster import of_session

pytestmark = pytest.mark.slow

NUM_CLIPS = int(os.environ.get("CHAOS_CLIPS", "1000"))
WARM = 100  # clips after which everything has its size
_DEADLINE_S = 2400.0
_EVERY_S = 0.5


@dataclass(frozen=True)
class Sample:
    """What the processes of a run hold at one moment."""

    done: int  # clips
    memory_mb: float  # anonymous: without files and without Ray's object store
    descriptors: int
    files: int  # in the temporary folders
    workers: int  # of Ray: one an actor


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path: Ray puts Unix sockets under it, whose names may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two seconds of 112x112 with sound, a thousand times: on a disk, so that each costs little."""
    folder = tmp_path / "videos"
    folder.mkdir()
    encode(tmp_path / "clip.mp4", size=(112, 112), num_frames=50, sound="aac")
    for number in range(NUM_CLIPS):
        shutil.copy(tmp_path / "clip.mp4", folder / f"{number:05d}.mp4")
    return folder


def _sample(session: int, temporary: Path, done: int) -> Sample:
    memory_kb = descriptors = workers = 0
    for pid in of_session(session):
        process = Path(f"/proc/{pid}")
        with suppress(FileNotFoundError, ProcessLookupError):
            status = (process / "status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            memory_kb += int(found.group(1)) if found else 0
            descriptors += len(list((process / "fd").iterdir()))
            workers += (process / "cmdline").read_bytes().startswith(b"ray::")
    files = sum(
        len(names) for folder, _, names in os.walk(temporary) if "/ray/" not in f"{folder}/"
    )
    return Sample(done, memory_kb / 1024, descriptors, files, workers)


def _watched(running: subprocess.Popen[bytes], log: Path, temporary: Path) -> Iterator[Sample]:
    deadline = time.monotonic() + _DEADLINE_S
    while running.poll() is None:
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(_EVERY_S)
        said = re.findall(r"^(\d+) of \d+ videos done", log.read_text(), flags=re.MULTILINE)
        yield _sample(running.pid, temporary, int(said[-1]) if said else 0)


def test_a_thousand_clips_leave_nothing_behind(
    corpus: Path,
    temporary: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    start = time.monotonic()
    night = Night(
        cluster=None,
        bucket="",
        model=write_tiny_model(tmp_path / "model", selector=True),
        output=str(tmp_path / "output"),
        log=tmp_path / "log",
        environment={"TMPDIR": str(temporary)},
        arguments=(f"source={corpus}", f"decode.temp_dir={temporary}", "cache.videos_per_file=16"),
    )
    running = night.start(new_session=True)
    try:
        samples = list(_watched(running, night.log, temporary))
    finally:
        for pid in of_session(running.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert running.returncode == 0, night.tail()
    seen = night.seen()
    assert len(seen) == NUM_CLIPS
    assert {status for status, _ in seen.values()} == {"ok"}

    warm = [sample for sample in samples if WARM <= sample.done < NUM_CLIPS]
    quarter = len(warm) // 4
    assert quarter >= 3, "too few samples"

    def median(part: list[Sample], name: str) -> float:
        return float(statistics.median(getattr(sample, name) for sample in part))

    lines = []
    for name in ("memory_mb", "descriptors", "files", "workers"):
        first, last = median(warm[:quarter], name), median(warm[-quarter:], name)
        most = max(getattr(sample, name) for sample in warm)
        lines.append(f"{name}: {first:,.0f} at first, {last:,.0f} at last, at most {most:,.0f}")
        allowed = {"memory_mb": 1.05, "descriptors": 1.02, "files": 1.0, "workers": 1.0}[name]
        assert last <= first * allowed + (2 if name == "files" else 0), lines
    record_property(*table_line("none: a soak", 1, seen, start, num_videos=NUM_CLIPS))
    for line in lines:
        record_property("chaos", f"    {line}")
