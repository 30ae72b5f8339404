"""Of two runs on one output one is refused; a dead one gives way, on a disk and on S3."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from jobs import compact
from pipeline.config import StorageConfig
from pipeline.errors import StartupError
from pipeline.lease import hold
from pipeline.storage import Storage, StorageError
from pipeline.testing.s3_server import S3Server

STORAGE = Storage(StorageConfig(attempts=1))


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "output")
        return
    s3: S3Server = request.getfixturevalue("s3")
    bucket = f"lease-{uuid.uuid4().hex[:12]}"
    s3.client().create_bucket(Bucket=bucket)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        yield f"s3://{bucket}/output"


def _silent(_: str) -> None:
    pass


def _leases(output: str) -> list[str]:
    return [info.uri for info in STORAGE.list(f"{output}/_lease")]


def test_a_second_run_is_refused_by_the_name_of_the_first(output: str) -> None:
    said: list[str] = []
    with hold(STORAGE, output, "run one", expiry_s=8, say=_silent) as lease:
        with (
            pytest.raises(StartupError, match=rf"held by run one on .*process {os.getpid()}"),
            hold(STORAGE, output, "run two", expiry_s=8, say=said.append),
        ):
            pytest.fail("both hold it")
        lease.check()
    assert "run one" in said[0]
    with hold(STORAGE, output, "run three", expiry_s=8, say=_silent) as lease:
        lease.check()
        assert len(_leases(output)) == 1  # the older ones are cleared away


def test_who_has_a_short_lease_respects_one_that_is_renewed_seldom(output: str) -> None:
    said: list[str] = []
    with hold(STORAGE, output, "run one", expiry_s=12, say=_silent) as lease:  # renews after 3 s
        with (
            pytest.raises(StartupError, match="held by run one"),
            hold(STORAGE, output, "run two", expiry_s=1, say=said.append),
        ):
            pytest.fail("both hold it")
        lease.check()
    assert "waiting up to 12 s" in said[0]


def test_a_lease_that_is_renewed_while_it_is_read_is_respected(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, times = Storage.read, 0

    def read(self: Storage, uri: str) -> bytes:
        nonlocal times
        times += 1
        if times % 2:
            raise StorageError("changed", "as S3 says when the etag is no longer that of the head")
        return whole(self, uri)

    with hold(STORAGE, output, "run one", expiry_s=2, say=_silent) as lease:
        monkeypatch.setattr(Storage, "read", read)
        with (
            pytest.raises(StartupError, match="held by run one"),
            hold(STORAGE, output, "run two", expiry_s=2, say=_silent),
        ):
            pytest.fail("both hold it")
        lease.check()


def test_of_many_that_start_at_once_at_most_one_holds(output: str) -> None:
    count, most = 0, 0
    lock, done = threading.Lock(), threading.Event()
    all_started = threading.Barrier(6)

    def start(number: int) -> bool:
        nonlocal count, most
        all_started.wait()
        try:
            with hold(STORAGE, output, f"run {number}", expiry_s=8, say=_silent):
                with lock:
                    count += 1
                    most = max(most, count)
                done.wait(12)  # until all others have been refused
                with lock:
                    count -= 1
        except StartupError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(start, number) for number in range(6)]
        refused = 0
        while refused < 5:
            time.sleep(0.05)
            refused = sum(future.done() and not future.result() for future in futures)
        done.set()
        held = sum(future.result() for future in futures)
    assert (held, most) == (1, 1)


_DIES = """
import os, sys
from pipeline.config import StorageConfig
from pipeline.lease import hold
from pipeline.storage import Storage
expiry_s = float(sys.argv[2])
with hold(Storage(StorageConfig()), sys.argv[1], "dead run", expiry_s=expiry_s, say=print):
    os._exit(9)
"""


def _die(output: str, expiry_s: float) -> None:
    command = [sys.executable, "-c", _DIES, output, str(expiry_s)]
    done = subprocess.run(command, check=False, timeout=60)
    assert done.returncode == 9


def test_a_dead_process_of_this_host_gives_way_at_once(output: str) -> None:
    _die(output, 60)
    said: list[str] = []
    with hold(STORAGE, output, "next run", expiry_s=60, say=said.append) as lease:
        lease.check()
    assert said == []


def _move_away(output: str) -> str:
    """Make the lease that of a process whose state cannot be known from here."""
    (uri,) = _leases(output)
    owner = json.loads(STORAGE.read(uri))
    STORAGE.write(uri, json.dumps({**owner, "host": "elsewhere", "process": ""}).encode())
    return uri


def test_a_run_of_another_host_that_renews_nothing_is_taken_over(output: str) -> None:
    _die(output, 2)
    _move_away(output)
    said: list[str] = []
    with hold(STORAGE, output, "next run", expiry_s=2, say=said.append) as lease:
        lease.check()
    assert "dead run on elsewhere" in said[0]


def test_who_finds_another_lease_behind_its_own_stops(output: str) -> None:
    with hold(STORAGE, output, "slow run", expiry_s=2, say=_silent) as lease:
        (uri,) = _leases(output)
        owner = {**json.loads(STORAGE.read(uri)), "command": "next run", "token": "another"}
        STORAGE.write(uri.replace("1.json", "2.json"), json.dumps(owner).encode())
        lease._thread.join(10)  # ends by itself only when it is told so
        with pytest.raises(StartupError, match=r"lost: taken by next run"):
            lease.check()


def test_who_cannot_renew_stops(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("storage_error", "gone")

    storage = Storage(StorageConfig(attempts=1))
    with hold(storage, output, "run", expiry_s=1, say=_silent) as lease:
        lease.check()
        monkeypatch.setattr(storage, "write", refuse)
        time.sleep(1.1)  # the whole time of the lease
        with pytest.raises(StartupError, match="could not be renewed"):
            lease.check()


@pytest.mark.parametrize("time_", [None, "soon"])
def test_a_broken_lease_is_said(output: str, time_: str | None) -> None:
    with hold(STORAGE, output, "run", expiry_s=2, say=_silent):
        (uri,) = _leases(output)
        owner = json.loads(STORAGE.read(uri))
    broken = {**owner, "expires_at": time_} if time_ else {}
    STORAGE.write(f"{output}/_lease/00000001.json", json.dumps(broken).encode())
    with (
        pytest.raises(StartupError, match=r"00000001\.json is broken"),
        hold(STORAGE, output, "run", expiry_s=2, say=_silent),
    ):
        pass


def test_only_the_first_of_two_creates_an_object(tmp_path: Path) -> None:
    uri = str(tmp_path / "folder" / "object")
    assert STORAGE.create(uri, b"one")
    assert not STORAGE.create(uri, b"two")
    assert STORAGE.read(uri) == b"one"
    assert len(list((tmp_path / "folder").iterdir())) == 1


class _ConditionalStore:
    """A store that honours If-None-Match, or says that it does not know it."""

    def __init__(self, code: str) -> None:
        self._code = code
        self.stored: list[bytes] = []

    def put_object(self, *, Body: bytes, IfNoneMatch: str = "", **_: str) -> None:
        if IfNoneMatch and (self.stored or self._code == "NotImplemented"):
            status = {"HTTPStatusCode": 412 if self._code == "PreconditionFailed" else 501}
            error = {"Error": {"Code": self._code}, "ResponseMetadata": status}
            raise ClientError(error, "PutObject")  # type: ignore[arg-type]
        self.stored.append(Body)


@pytest.mark.parametrize(
    ("code", "created", "stored"),
    [("PreconditionFailed", False, [b"one"]), ("NotImplemented", True, [b"one", b"two"])],
)
def test_an_s3_write_is_conditional_where_the_store_knows_it(
    code: str, created: bool, stored: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _ConditionalStore(code)
    monkeypatch.setattr(Storage, "_client", lambda _: store)
    assert STORAGE.create("s3://bucket/key", b"one")
    assert STORAGE.create("s3://bucket/key", b"two") == created
    assert store.stored == stored


def test_a_compaction_is_refused_while_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["compact.py", f"output={tmp_path}", "lease.expiry_s=4"])
    with hold(STORAGE, str(tmp_path), "run one", expiry_s=4, say=_silent):
        assert compact.main() == 2
    assert "held by run one" in capsys.readouterr().err
    assert compact.main() == 0
