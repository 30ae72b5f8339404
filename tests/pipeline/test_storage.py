"""Objects by uri: local files, and an S3 server that is made to misbehave."""

import itertools
import os
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage as storage_module
from pipeline.config import StorageConfig
from pipeline.storage import ObjectInfo, Storage, StorageError, join

CONTENT = bytes(itertools.islice(itertools.cycle(range(251)), 100_000))


class Faulty:
    """An S3 server in a thread; `faults` are played one a request, then it answers rightly.

    A fault is a status, or ("cut", n): break the connection after n bytes of the body.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: list[int | tuple[str, int]] = []
        self.ranges: list[str] = []  # as requested by GET
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

            def do_HEAD(self) -> None:
                faulty.answer(self, with_body=False)

            def do_GET(self) -> None:
                faulty.ranges.append(self.headers.get("Range", ""))
                faulty.answer(self, with_body=True)

        self._handler = Handler
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        fault = self.faults.pop(0) if self.faults and with_body else None
        content = self.objects.get(request.path)
        status = fault if isinstance(fault, int) else 404 if content is None else 206
        if status == 206 and request.headers.get("If-Match", '"e"') != '"e"':
            status = 412
        body = content or b""
        if given := request.headers.get("Range"):
            start, stop = given.removeprefix("bytes=").split("-")
            body = body[int(start) : int(stop) + 1]
        if status != 206:
            names = {404: "NoSuchKey", 403: "AccessDenied", 503: "SlowDown"}
            code = names.get(status, "Problem")
            body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        request.send_response(status if given or status != 206 else 200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", '"e"')
        request.end_headers()
        if with_body:
            request.wfile.write(body[: fault[1]] if isinstance(fault, tuple) else body)
        request.close_connection = True


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage_module, "_MAX_PAUSE_S", 0.01)
    faulty = Faulty()
    faulty.objects["/bucket/video.mp4"] = CONTENT
    yield faulty
    faulty.stop()


def made(faulty: Faulty, attempts: int = 4) -> Storage:
    return Storage(StorageConfig(endpoint_url=faulty.url, attempts=attempts, timeout_s=5))


INFO = ObjectInfo("s3://bucket/video.mp4", len(CONTENT), "e", 0)


def test_a_body_that_breaks_off_is_continued_behind_its_last_byte(
    faulty: Faulty, tmp_path: Path
) -> None:
    faulty.faults = [("cut", 30_000), ("cut", 0), ("cut", 10_000)]
    made(faulty).download(INFO, tmp_path / "video")
    assert (tmp_path / "video").read_bytes() == CONTENT
    starts = [int(given.removeprefix("bytes=").split("-")[0]) for given in faulty.ranges]
    assert starts == [0, 30_000, 30_000, 40_000]


@pytest.mark.parametrize("status", [500, 503])
def test_a_busy_server_is_asked_again(faulty: Faulty, status: int) -> None:
    faulty.faults = [status] * 3
    assert made(faulty).read("s3://bucket/video.mp4") == CONTENT


def test_a_server_that_never_answers_is_given_up_after_the_attempts(
    faulty: Faulty, tmp_path: Path
) -> None:
    faulty.faults = [("cut", 10)] * 100
    with pytest.raises(StorageError, match="in 4 tries") as caught:
        made(faulty).download(INFO, tmp_path / "video")
    assert caught.value.error_type == "storage_error"
    assert len(faulty.ranges) == 4


def test_a_store_that_restarts_is_waited_for(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = made(faulty)
    assert storage.read(INFO.uri) == CONTENT
    faulty.stop()
    refused = 0

    def pause(_: float) -> None:
        nonlocal refused
        refused += 1
        if refused == 3:
            faulty.start()

    monkeypatch.setattr("time.sleep", pause)  # botocore's pauses among them
    assert storage.read(INFO.uri) == CONTENT
    assert refused >= 3


def test_a_closed_port_is_given_up_after_the_attempts(faulty: Faulty) -> None:
    faulty.stop()
    with pytest.raises(StorageError, match=r"in 2 tries .*check storage\.endpoint_url") as caught:
        made(faulty, attempts=2).read(INFO.uri)
    assert caught.value.error_type == "storage_error"


@pytest.mark.parametrize(("fails", "error_type"), [(2, None), (99, "forbidden")])
def test_credentials_that_cannot_be_fetched_are_asked_for_again(
    faulty: Faulty,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: int,
    error_type: str | None,
) -> None:
    calls, given = tmp_path / "calls", tmp_path / "given"
    given.write_text('{"Version": 1, "AccessKeyId": "id", "SecretAccessKey": "do-not-tell"}')
    script = tmp_path / "fetch.sh"
    script.write_text(f"echo >> {calls}; [ $(wc -l < {calls}) -gt {fails} ] || exit 1; cat {given}")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh {script}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    if error_type is None:
        assert made(faulty).read(INFO.uri) == CONTENT
        return
    with pytest.raises(StorageError, match="no credentials in 4 tries") as caught:
        made(faulty).read(INFO.uri)
    assert caught.value.error_type == error_type
    assert faulty.ranges == []


@pytest.mark.parametrize(("status", "error_type"), [(404, "not_found"), (403, "forbidden")])
def test_an_answer_that_will_not_change_is_taken_at_once(
    faulty: Faulty, tmp_path: Path, status: int, error_type: str
) -> None:
    faulty.faults = [status]
    with pytest.raises(StorageError, match=r"s3://bucket/video\.mp4") as caught:
        made(faulty).download(INFO, tmp_path / "video")
    assert caught.value.error_type == error_type
    assert len(faulty.ranges) == 1
    assert "do-not-tell" not in str(caught.value)


def test_a_vanished_key_does_not_exist(faulty: Faulty) -> None:
    storage = made(faulty)
    assert not storage.exists("s3://bucket/other.mp4")
    assert storage.exists("s3://bucket/video.mp4")
    with pytest.raises(StorageError) as caught:
        storage.stat("s3://bucket/other.mp4")
    assert caught.value.error_type == "not_found"


def test_an_object_written_anew_is_changed(faulty: Faulty, tmp_path: Path) -> None:
    old = ObjectInfo(INFO.uri, INFO.size_bytes, "older", 0)
    with pytest.raises(StorageError) as caught:
        made(faulty).download(old, tmp_path / "video")
    assert caught.value.error_type == "changed"


def test_a_column_is_read_without_the_rest_of_the_file(faulty: Faulty) -> None:
    wide = [bytes([number]) * 2_000_000 for number in range(4)]
    sink = pa.BufferOutputStream()
    table = pa.table({"key": ["a", "b", "c", "d"], "wide": wide})
    pq.write_table(table, sink, row_group_size=1, compression="none", use_dictionary=False)
    faulty.objects["/bucket/t.parquet"] = sink.getvalue().to_pybytes()
    with made(faulty).open("s3://bucket/t.parquet") as file:
        keys = pq.ParquetFile(pa.PythonFile(file)).read(columns=["key"])
    assert keys.column("key").to_pylist() == ["a", "b", "c", "d"]
    bounds = [given.removeprefix("bytes=").split("-") for given in faulty.ranges]
    fetched = sum(int(stop) - int(start) + 1 for start, stop in bounds)
    assert fetched < 2_500_000  # of more than 8 million


def test_an_open_object_reads_as_the_bytes_do(faulty: Faulty) -> None:
    faulty.faults = [("cut", 100), 503]
    with made(faulty).open("s3://bucket/video.mp4") as file:
        assert file.seek(-10, 2) == len(CONTENT) - 10
        assert file.read() == CONTENT[-10:]
        file.seek(500)
        assert file.read(1000) == CONTENT[500:1500]
        assert file.tell() == 1500


def test_a_pickled_storage_works_and_carries_no_secret(faulty: Faulty) -> None:
    storage = made(faulty)
    storage.stat("s3://bucket/video.mp4")
    pickled = pickle.dumps(storage)
    assert b"do-not-tell" not in pickled
    assert pickle.loads(pickled).stat("s3://bucket/video.mp4").size_bytes == len(CONTENT)


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(StorageError("not_found", "where")))
    assert (error.error_type, str(error)) == ("not_found", "where")


NAMES = ["a.mp4", "sub/b c#?%20.MP4", "sub/映画.mp4", "z.txt"]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for name in NAMES:
        Storage(StorageConfig()).write(str(tmp_path / name), name.encode())
    return tmp_path


def test_listing_is_recursive_sorted_and_by_ending(local: Path) -> None:
    storage = Storage(StorageConfig())
    found = list(storage.list(str(local), suffixes=[".mp4"]))
    assert [info.uri for info in found] == sorted(str(local / name) for name in NAMES[:3])
    assert [info.size_bytes for info in found] == [
        len(Path(info.uri).relative_to(local).as_posix().encode()) for info in found
    ]
    assert [info.uri for info in storage.list(str(local / "a.mp4"))] == [str(local / "a.mp4")]


def test_local_files_are_read_as_they_are_named(local: Path, tmp_path: Path) -> None:
    storage = Storage(StorageConfig())
    for name in NAMES:
        assert storage.read(f"file://{local / name}") == name.encode()
        info = storage.stat(str(local / name))
        storage.download(info, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == name.encode()
    storage.delete(str(local / "a.mp4"))
    storage.delete(str(local / "a.mp4"))
    assert not storage.exists(str(local / "a.mp4"))


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    storage = Storage(StorageConfig())
    for call in (storage.read, storage.stat, storage.open, lambda uri: list(storage.list(uri))):
        with pytest.raises(StorageError, match="nowhere") as caught:
            call(str(tmp_path / "nowhere"))
        assert caught.value.error_type == "not_found"


def test_a_write_that_fails_leaves_the_old_content_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(StorageConfig())
    path = tmp_path / "answers.parquet"
    storage.write(str(path), pa.py_buffer(b"old"))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.write(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parts_are_joined_by_one_slash() -> None:
    assert join("s3://bucket/", "/a b/", "c#.mp4") == "s3://bucket/a b/c#.mp4"
