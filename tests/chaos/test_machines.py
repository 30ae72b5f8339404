"""Nights on which machines, disks, clocks or credentials fail: every row is there, and once."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server
from tests.chaos.fault_proxy import AgingKeys, fault_proxy
from tests.chaos.night import (
    RUN_DEADLINE_S,
    STORAGE,
    Night,
    Seen,
    mend,
    names,
    table_line,
    wait_for,
)
from tests.ray_cluster import local_cluster, second_node

pytestmark = pytest.mark.slow

AHEAD = Path(__file__).parent / "ahead"
GONE_S = 60.0
MIDDLE = 60  # requests into a run of about 130

StartNight = Callable[..., Night]
Record = Callable[[str, object], None]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("the store gone for 60 s", ()),
        ("the same, storage.attempts=14", ("storage.attempts=14", "lease.expiry_s=300")),
    ],
)
def test_a_store_that_is_gone_for_a_minute(
    name: str,
    arguments: tuple[str, ...],
    start_night: StartNight,
    undisturbed: tuple[Seen, float],
    s3: S3Server,
    record_property: Record,
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    with fault_proxy(s3.endpoint_url) as proxy:
        night = start_night(endpoint_url=proxy.endpoint_url, arguments=arguments)
        running = night.start()
        wait_for("the middle", lambda: proxy.counts.total() >= MIDDLE, running)
        proxy.gone_until = time.monotonic() + GONE_S
        status = running.wait(RUN_DEADLINE_S)
        runs = 1
        if arguments:
            assert status == 0, night.tail()
        elif night.seen() != expected:
            runs += mend(night, expected)
        assert proxy.counts["gone"]
    assert night.seen() == expected
    assert night.faults() == []
    record_property(*table_line(name, runs, expected, start))


def _aging(s3: S3Server, lifetime_s: float) -> AgingKeys:
    return AgingKeys(lifetime_s, s3.access_key, s3.secret_key)


def _temporary_keys() -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": f"AGED-{time.time()}",
        "AWS_SECRET_ACCESS_KEY": "of no matter",
        "AWS_SESSION_TOKEN": "temporary",
    }


def test_credentials_that_expire_and_are_not_renewed(
    start_night: StartNight,
    undisturbed: tuple[Seen, float],
    s3: S3Server,
    record_property: Record,
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    with fault_proxy(s3.endpoint_url, keys=_aging(s3, 3600)) as proxy:
        night = start_night(
            endpoint_url=proxy.endpoint_url, cluster=None, environment=_temporary_keys()
        )
        running = night.start()
        wait_for("the middle", lambda: proxy.counts.total() >= MIDDLE, running)
        proxy.keys_from = time.time()
        assert running.wait(RUN_DEADLINE_S)  # it ends, with an error
        assert proxy.counts["expired"]
        assert night.seen() == {}
        assert re.search("ExpiredToken|400", night.tail())
        runs = 1 + mend(replace(night, environment=_temporary_keys()), expected)
    assert night.faults() == []
    record_property(*table_line("credentials expire, new ones next night", runs, expected, start))


_ISSUE = """
import json, time
from datetime import datetime, timedelta, timezone
# boto3 asks for new ones when less than 15 minutes are left: after 4 s.
until = datetime.now(timezone.utc) + timedelta(minutes=15, seconds=4)
print(json.dumps({
    "Version": 1,
    "AccessKeyId": f"AGED-{time.time()}",
    "SecretAccessKey": "of no matter",
    "SessionToken": "temporary",
    "Expiration": until.isoformat(),
}))
"""


def test_credentials_that_are_renewed(
    start_night: StartNight,
    undisturbed: tuple[Seen, float],
    s3: S3Server,
    tmp_path: Path,
    record_property: Record,
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    issue, config = tmp_path / "issue.py", tmp_path / "config"
    issue.write_text(_ISSUE)
    config.write_text(f"[default]\ncredential_process = {sys.executable} {issue}\n")
    keys = _aging(s3, 15)
    with fault_proxy(s3.endpoint_url, keys=keys) as proxy:
        night = start_night(
            endpoint_url=proxy.endpoint_url,
            cluster=None,
            environment={
                "AWS_ACCESS_KEY_ID": "",
                "AWS_SECRET_ACCESS_KEY": "",
                "AWS_CONFIG_FILE": str(config),
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            },
        )
        assert night.run() == 0, night.tail()
        assert proxy.counts["expired"] == 0
        issued = sorted(float(key.partition("-")[2]) for key in proxy.keys_seen)
        assert issued[-1] - issued[0] > keys.lifetime_s  # the first ones had expired by the end
    assert night.seen() == expected
    assert night.faults() == []
    record_property(*table_line("credentials expire and are renewed", 1, expected, start))


def test_a_node_that_dies(
    start_night: StartNight, undisturbed: tuple[Seen, float], record_property: Record
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    # All of it fits the first node, of which Ray fills one half before it takes the other node.
    night = start_night(arguments=("pools.compress_cpus=1", "pools.answer_cpus=0.5"))
    with (
        local_cluster(num_cpus=3, host="127.0.0.2") as cluster,
        second_node(cluster, num_cpus=2) as node,
    ):
        night = replace(night, cluster=cluster)
        running = night.start()
        wait_for(
            "work on the second node",
            lambda: bool(node.workers()) and any("/part-" in uri for uri in names(night)),
            running,
        )
        node.kill()
        failed = True
        with suppress(subprocess.TimeoutExpired):
            failed = running.wait(RUN_DEADLINE_S) != 0
        running.kill()
        running.wait()
        runs = 1
        if failed or night.seen() != expected:
            runs += mend(night, expected)
    assert night.faults() == []
    record_property(*table_line("kill -9 of a raylet and its workers", runs, expected, start))


@contextmanager
def _small_disk(folder: Path, size_kb: int, later_kb: int) -> Iterator[Callable[[], object]]:
    """Mount a file system of that size; gives a function that makes it larger."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr}")
    try:
        remount = ["mount", "-o", f"remount,size={later_kb}k", str(folder)]
        yield lambda: subprocess.run(remount, check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(
    start_night: StartNight,
    undisturbed: tuple[Seen, float],
    tmp_path: Path,
    record_property: Record,
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    night = start_night(arguments=(f"decode.temp_dir={tmp_path / 'disk'}",))
    sizes = {
        info.uri.partition("/videos/")[2]: info.size_bytes
        for info in STORAGE.list(f"s3://{night.bucket}/videos")
    }
    largest = max(sizes, key=lambda name: sizes[name])
    size_kb = sizes[largest] // 1024
    with _small_disk(tmp_path / "disk", size_kb // 2, later_kb=4 * size_kb) as enlarge:
        assert night.run() == 0, night.tail()
        seen = night.seen()
        full = {name for name, what in seen.items() if what == ("failed", "disk_full")}
        assert largest in full
        assert not {name for name in full if sizes[name] < sizes[largest] // 4}
        assert {n: w for n, w in seen.items() if n not in full} == {
            n: w for n, w in expected.items() if n not in full
        }
        enlarge()
        runs = 1 + mend(night, expected)
    assert night.faults() == []
    record_property(*table_line("temporary folder full", runs, expected, start))


def test_cache_files_with_flipped_bits(
    start_night: StartNight, undisturbed: tuple[Seen, float], record_property: Record
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    first = start_night()
    first = replace(first, cache=f"{first.output}-cache")
    assert first.run() == 0, first.tail()
    parts = sorted(
        info.uri for info in STORAGE.list(first.cache) if info.uri.rpartition("/")[2][:5] == "part-"
    )
    for number, uri in enumerate(parts[:4]):
        data = bytearray(STORAGE.read(uri))
        place = len(data) // 2 if number % 2 else len(data) - 7  # in a page, in the footer's length
        data[place] ^= 0x10
        STORAGE.write(uri, bytes(data))
    assert len(first.faults()) >= 4
    second = start_night(cache=first.cache)  # other answers, the same tokens
    assert second.run() == 0, second.tail()
    seen = second.seen()
    assert len(seen) == len(expected)
    damaged = {name for name, what in seen.items() if what == ("failed", "cache_corrupt")}
    assert damaged
    assert all(seen[name] == expected[name] for name in seen.keys() - damaged)
    runs = 2 + mend(second, expected)
    record_property(*table_line("4 cache files with flipped bits", runs, expected, start))


def test_half_written_files_of_a_dead_run(
    start_night: StartNight, undisturbed: tuple[Seen, float], record_property: Record
) -> None:
    expected, _ = undisturbed
    start = time.monotonic()
    night = start_night()
    running = night.start()
    wait_for("answers", lambda: any("/videos-" in uri for uri in names(night)), running)
    running.kill()
    running.wait()
    half_written = []
    for uri in names(night):
        folder, _, name = uri.rpartition("/")
        kind, _, _ = name.partition("-")
        if kind in ("answers", "videos", "part", "fresh"):
            data = STORAGE.read(uri)
            half_written.append(f"{folder}/{kind}-{uuid.uuid4().hex}.parquet")
            STORAGE.write(half_written[-1], data[: len(data) // 2])
    assert {uri.rpartition("/")[2].partition("-")[0] for uri in half_written} >= {
        "answers",
        "videos",
        "part",
    }
    runs = 1 + mend(night, expected)
    # Answers and videos were adopted by nobody; a cache file is named until it is deleted.
    faults = night.faults()
    assert all("/part-" in fault and "cannot be read" in fault for fault in faults)
    for uri in half_written:
        STORAGE.delete(uri)
    assert night.faults() == []
    record_property(*table_line("half-written files of a dead run", runs, expected, start))


@pytest.fixture
def small_corpus(start_night: StartNight, s3: S3Server, tmp_path: Path) -> tuple[Night, Path, Path]:
    """Three videos of their own, and two files to put in place of one."""
    prefix = f"small-{uuid.uuid4().hex[:8]}"
    night = start_night(videos=prefix)
    clips = render(tmp_path / "clips", ["carphone.mp4", "h264_sound.mp4"])
    for name in ("one.mp4", "two.mp4", "poison.mp4"):
        s3.client().upload_file(str(clips["carphone.mp4"]), night.bucket, f"{prefix}/{name}")
    return night, clips["carphone.mp4"], clips["h264_sound.mp4"]


def test_clocks_that_are_wrong(
    small_corpus: tuple[Night, Path, Path], s3: S3Server, record_property: Record
) -> None:
    start = time.monotonic()
    night, _, other = small_corpus
    texts = []
    # Ten minutes ahead, then ten behind: S3 itself refuses a quarter of an hour.
    for ahead_s in (600, -600, 0):
        path = os.pathsep.join([str(AHEAD), os.environ.get("PYTHONPATH", str(Path.cwd()))])
        environment = {"PYTHONPATH": path, "CHAOS_AHEAD_S": str(ahead_s)}
        wrong = replace(night, cluster=None, environment=environment)
        assert wrong.run() == 0, wrong.tail()
        seen = wrong.seen()
        assert len(seen) == 3
        assert {status for status, _ in seen.values()} == {"ok"}
        texts.append(seen["two.mp4"][1])
        if ahead_s == 600:
            s3.client().upload_file(str(other), night.bucket, f"{night.videos}/two.mp4")
    assert texts[0] != texts[1] == texts[2]
    assert night.faults() == []
    record_property(*table_line("clocks 10 min ahead, then behind", 3, seen, start, num_videos=3))


def _process_of(port: int) -> int | None:
    """Return the process that holds the connection from this port."""
    inode = None
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].partition(":")[2], 16) == port:
            inode = fields[9]
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if inode and entry.readlink().name == f"socket:[{inode}]":
                return int(entry.parts[2])
        except OSError:
            continue
    return None


def test_a_video_that_kills_its_worker_every_time(
    small_corpus: tuple[Night, Path, Path], s3: S3Server, record_property: Record
) -> None:
    start = time.monotonic()
    night, _, other = small_corpus
    kills: list[int] = []

    def poison(path: str, port: int) -> None:
        if not path.endswith("/poison.mp4"):
            return
        pid = _process_of(port)
        assert pid is not None
        kills.append(pid)
        os.kill(pid, signal.SIGKILL)

    with fault_proxy(s3.endpoint_url, on_get=poison) as proxy:
        night = replace(night, endpoint_url=proxy.endpoint_url)
        for runs in (1, 2, 3):
            assert night.run() == 0, night.tail()
            assert len(kills) == 2 * runs
            seen = night.seen()
            assert seen.pop("poison.mp4") == ("failed", "worker_crash")
            assert {status for status, _ in seen.values()} == {"ok"}
            assert len(seen) == 2
        assert "poison.mp4: 2 workers died" in night.tail()
        assert night.run() == 0, night.tail()  # given up: it is not touched any more
        assert len(kills) == 6
        assert night.seen()["poison.mp4"] == ("failed", "worker_crash")
        proxy.on_get = None
        s3.client().upload_file(str(other), night.bucket, f"{night.videos}/poison.mp4")
        assert night.run() == 0, night.tail()
    seen = night.seen()
    assert {status for status, _ in seen.values()} == {"ok"}
    assert night.faults() == []
    record_property(*table_line("a video that kills its workers", 5, seen, start, num_videos=3))
