"""The decode stage as a plain callable: a bad video costs one row, and nothing is left behind."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import rows
from pipeline.boundary import Roots
from pipeline.config import DecodeConfig, MediaConfig, StorageConfig
from pipeline.decoder_process import DecoderProcess
from pipeline.film import decode_file
from pipeline.media_index import DecodeError
from pipeline.stages.decode import Decode
from pipeline.storage import ObjectInfo, Storage, StorageError
from pipeline.testing import clips

MEDIA = MediaConfig()
ROOTS = Roots(("/",), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decode]:
    limits = DecodeConfig(temp_dir=str(tmp_path_factory.mktemp("temp")))
    stage = Decode(MEDIA, limits, StorageConfig(attempts=1), ROOTS)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
        environment.setenv("SOME_TOKEN", "do-not-tell")
        process = DecoderProcess(MEDIA, DecodeConfig(deadline_s=4, probe_s=4))
        process.start()
        yield process
        process.close()


def identity(path: Path, **changes: Any) -> dict[str, Any]:
    size_bytes = path.stat().st_size if path.is_file() else 10
    row = {"video_key": path.name, "uri": str(path), "size_bytes": size_bytes, "etag": ""}
    return {**row, "prompts": [], "attempts": 1, **changes}


def run(stage: Decode, *given: dict[str, Any]) -> list[dict[str, Any]]:
    return list(rows.iterate(pa.concat_tables(stage(rows.build(given, rows.IDENTITY)))))


def test_rows_carry_what_decode_file_gives(stage: Decode, folder: Path) -> None:
    path = clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"]
    (row,) = run(stage, identity(path))

    expected = decode_file(path, MEDIA, DecodeConfig())
    frames = np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["frames_shape"])
    assert np.array_equal(frames, expected.frames)
    assert np.array_equal(np.frombuffer(row["audio"], dtype=np.float32), expected.audio)
    assert (row["duration_s"], row["fps"], row["has_audio"]) == (5.0, 2.0, True)
    assert row["error_type"] is None
    assert row["decode_s"] > 0


def test_every_kind_of_bad_video_is_one_row_among_good_ones(stage: Decode, folder: Path) -> None:
    expected = {
        "h264_sound.mp4": None,
        "empty.mp4": "not_a_video",
        "page.mp4": "not_a_video",
        "audio_only.m4a": "no_video_stream",
        "moov_missing.mp4": "not_a_video",
        "truncated.mp4": "truncated",
        "one_pixel.mkv": None,
        "vanished.mp4": "not_found",
        "carphone.mp4": None,
    }
    paths = clips.render(folder, [name for name in expected if name != "vanished.mp4"])
    out = run(stage, *(identity(paths.get(name, folder / name)) for name in expected))

    assert {row["video_key"]: row["error_type"] for row in out} == expected
    for row in out:
        if row["error_type"]:
            assert row["error_stage"] == "decode"
            assert row["uri"] in row["error_message"]
            assert row["frames"] is None


def test_a_failed_row_passes_untouched(stage: Decode) -> None:
    failed = rows.failed(identity(Path("/nowhere")), "source", "forbidden", "no")
    (row,) = run(stage, failed)
    assert (row["error_stage"], row["error_message"], row["decode_s"]) == ("source", "no", None)


def test_a_file_that_changed_since_the_listing_is_not_decoded(stage: Decode, folder: Path) -> None:
    path = clips.render(folder, ["carphone.mp4"])["carphone.mp4"]
    (row,) = run(stage, identity(path, size_bytes=12))
    assert row["error_type"] == "changed"


def test_an_object_over_the_size_limit_is_not_fetched(folder: Path, tmp_path: Path) -> None:
    stage = Decode(
        MEDIA, DecodeConfig(max_size_bytes=5, temp_dir=str(tmp_path)), StorageConfig(), ROOTS
    )
    (row,) = run(stage, identity(folder / "never-opened.mp4"))
    stage.close()
    assert row["error_type"] == "too_large"
    assert "decode.max_size_bytes" in row["error_message"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_costs_the_videos_that_do_not_fit(
    stage: Decode, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "it is full")

    monkeypatch.setattr(Storage, "download", refuse)
    row = {"video_key": "a", "uri": "s3://b/a.mp4", "size_bytes": 10, "etag": "e"}
    (out,) = run(stage, {**row, "prompts": [], "attempts": 1})
    assert (out["error_stage"], out["error_type"]) == ("decode", "disk_full")
    assert "s3://b/a.mp4: 10 bytes do not fit in" in out["error_message"]
    monkeypatch.setattr(Storage, "download", lambda *_: (_ for _ in ()).throw(OSError(5, "bug")))
    with pytest.raises(OSError, match="bug"):
        run(stage, {**row, "prompts": [], "attempts": 1})


def test_names_with_spaces_and_unicode_are_read(stage: Decode, folder: Path) -> None:
    path = folder / "Käse #1 %20? 映画.mp4"
    path.write_bytes(clips.render(folder, ["carphone.mp4"])["carphone.mp4"].read_bytes())
    (row,) = run(stage, identity(path))
    assert row["error_type"] is None


def test_a_copy_is_removed_whether_it_decodes_or_not(
    stage: Decode, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clips.render(folder, ["carphone.mp4", "page.mp4"])
    seen = []

    def download(info: ObjectInfo, path: Path) -> None:
        seen.append((path, info.etag))
        path.write_bytes(paths.get(Path(info.uri).name, path).read_bytes())

    monkeypatch.setattr(stage._storage, "download", download)
    uris = [Path(f"s3:/bucket/{name}") for name in ("carphone.mp4", "page.mp4", "gone.mp4")]
    given = [identity(uri, uri=f"s3://bucket/{uri.name}", etag="e") for uri in uris[:2]]
    out = run(stage, *given)

    assert [row["error_type"] for row in out] == [None, "not_a_video"]
    assert {etag for _, etag in seen} == {"e"}
    assert not any(path.exists() for path, _ in seen)

    def broken(info: ObjectInfo, path: Path) -> None:
        path.write_bytes(b"half")
        raise StorageError("changed", f"{info.uri}: changed")

    monkeypatch.setattr(stage._storage, "download", broken)
    (row,) = run(stage, given[0])
    assert row["error_type"] == "changed"
    assert list(stage._temp_dir.iterdir()) == []


def test_a_hang_costs_one_video(process: DecoderProcess, folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "never-written.mp4"
    os.mkfifo(pipe)  # opening it waits for a writer: a decoder that hangs
    process.start()
    first = process.pid
    with pytest.raises(DecodeError, match=r"decode\.probe_s") as caught:
        process.decode(pipe)
    assert caught.value.error_type == "probe_timeout"
    assert first is not None
    assert not Path(f"/proc/{first}").exists()
    assert process.decode(clips.render(folder, ["carphone.mp4"])["carphone.mp4"]).frames


def test_a_killed_child_costs_one_video(
    process: DecoderProcess, folder: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "never-written.mp4"
    os.mkfifo(pipe)
    process.start()
    pid = process.pid
    assert pid is not None

    def kill_when_opened() -> None:
        descriptor = os.open(pipe, os.O_WRONLY)  # returns when the child has opened it to read
        os.kill(pid, signal.SIGSEGV)
        os.close(descriptor)

    killer = threading.Thread(target=kill_when_opened)
    killer.start()
    with pytest.raises(DecodeError, match="SIGSEGV") as caught:
        process.decode(pipe)
    killer.join()
    assert caught.value.error_type == "decode_crash"
    assert process.decode(clips.render(folder, ["carphone.mp4"])["carphone.mp4"]).frames
    assert process.pid != pid


def test_a_child_lost_while_idle_costs_nothing(process: DecoderProcess, folder: Path) -> None:
    process.start()
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert process.decode(clips.render(folder, ["carphone.mp4"])["carphone.mp4"]).frames


def test_too_little_memory_costs_one_video(folder: Path) -> None:
    process = DecoderProcess(MEDIA, DecodeConfig(memory_limit_bytes=96 << 20))
    with pytest.raises(DecodeError) as caught:
        process.decode(clips.render(folder, ["huge_frames.mp4"])["huge_frames.mp4"])
    assert caught.value.error_type == "out_of_memory"
    assert "decode.memory_limit_bytes" in caught.value.message
    assert process.decode(clips.render(folder, ["carphone.mp4"])["carphone.mp4"]).frames
    process.close()


def test_the_child_has_no_credentials(process: DecoderProcess) -> None:
    process.start()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "do-not-tell"
    assert b"do-not-tell" not in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_the_child_ends_with_its_parent() -> None:
    script = (
        "import os\n"
        "from pipeline.config import DecodeConfig, MediaConfig\n"
        "from pipeline.decoder_process import DecoderProcess\n"
        "process = DecoderProcess(MediaConfig(), DecodeConfig())\n"
        "process.start()\n"
        "print(process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, check=False
    )
    # The child's copy of nothing but its own pipes is open: it ends when reading meets the end.
    child = Path(f"/proc/{int(parent.stdout)}/stat")
    deadline = time.monotonic() + 20
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_folders_of_killed_actors_are_swept_and_those_of_living_ones_are_not(
    tmp_path: Path,
) -> None:
    left = Path(tempfile.mkdtemp(prefix="video-decode-", dir=tmp_path))  # nobody holds its lock
    (left / "video.mp4").write_bytes(b"half a download")
    limits = DecodeConfig(temp_dir=str(tmp_path))
    first = Decode(MEDIA, limits, StorageConfig(), ROOTS)
    assert not left.exists()
    second = Decode(MEDIA, limits, StorageConfig(), ROOTS)
    assert first._temp_dir.is_dir()
    assert second._temp_dir.is_dir()
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


def memory_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_open(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_two_hundred_decodes_leave_nothing_behind(stage: Decode, folder: Path) -> None:
    names = ["h264_sound.mp4", "page.mp4", "carphone.mp4", "truncated.mp4", "bit_flipped.mp4"]
    given = [identity(path) for path in clips.render(folder, names).values()]

    def state() -> tuple[int, int, int, int]:
        pid = stage._decoder.pid
        assert pid is not None
        return pid, num_open(pid), num_open(os.getpid()), memory_bytes(pid)

    for _ in range(10):
        run(stage, *given)
    after_50 = state()
    for _ in range(30):
        run(stage, *given)
    after_200 = state()
    held = os.fstat(stage._decoder._shared_fd).st_size

    assert after_200[:3] == after_50[:3]  # the same child, with as many open files
    assert after_200[3] - after_50[3] < 16 << 20
    assert held == 0
    assert list(stage._temp_dir.iterdir()) == []
