"""What a file may cost: refused by what it says of itself, and bounded where it lies."""

import os
import resource
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnisift.media import MAX_ASPECT, frame_size
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.decoder import largest_answer_bytes
from pipeline.decoder_process import DecoderProcess
from pipeline.film import Film, decode_file
from pipeline.media_index import DecodeError, check_container, open_media
from pipeline.testing import clips

MEDIA = MediaConfig()
LIMITS = DecodeConfig(deadline_s=20, memory_limit_bytes=1 << 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def decoder() -> Iterator[DecoderProcess]:
    decoder = DecoderProcess(MEDIA, LIMITS)
    decoder.start()
    yield decoder
    decoder.close()


def refusal(path: Path, **limits: Any) -> tuple[str, str]:
    """Return error_type and message, and see that nothing was decoded before."""
    reached = []
    with pytest.raises(DecodeError) as caught:
        Film(path, MEDIA, DecodeConfig(**limits), understood=lambda: reached.append("decoding"))
    assert reached == []
    return caught.value.error_type, caught.value.message


def with_streams(mp4: bytes, count: int) -> bytes:
    """Repeat the first track of an MP4 until there are `count`; its pictures are then elsewhere."""
    moov, trak = mp4.index(b"moov") - 4, mp4.index(b"trak") - 4
    (moov_bytes,) = struct.unpack_from(">I", mp4, moov)
    (trak_bytes,) = struct.unpack_from(">I", mp4, trak)
    more = mp4[trak : trak + trak_bytes] * (count - mp4.count(b"trak"))
    size = struct.pack(">I", moov_bytes + len(more))
    return mp4[:moov] + size + mp4[moov + 4 : trak] + more + mp4[trak:]


def test_too_many_streams_are_refused_whatever_their_number(folder: Path) -> None:
    mp4 = clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"].read_bytes()
    path = folder / "streams.mp4"
    path.write_bytes(with_streams(mp4, 9))
    with open_media(path) as container:
        check_container(container, max_streams=9, max_duration_s=60)
    error_type, message = refusal(path, max_streams=8)
    assert error_type == "too_many_streams"
    assert "9 streams are more than the 8 of decode.max_streams" in message
    # over FFmpeg's own limit of 1,000, which looks like a shortage of memory
    path.write_bytes(with_streams(mp4, 1200))
    assert refusal(path)[0] == "too_many_streams"


def test_a_long_video_is_refused_by_what_it_states(folder: Path) -> None:
    path = clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"]
    error_type, message = refusal(path, max_duration_s=4.9)
    assert error_type == "too_long"
    assert "decode.max_duration_s" in message
    assert decode_file(path, MEDIA, DecodeConfig(max_duration_s=5.4)).duration_s == 5.0


def test_large_frames_are_refused_by_what_they_state(folder: Path) -> None:
    path = clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"]
    assert refusal(path, max_source_pixels=320 * 180 - 1)[0] == "too_large"


def test_the_child_works_under_limits_of_the_system(decoder: DecoderProcess, folder: Path) -> None:
    decoder.decode(clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"])
    assert decoder.pid is not None
    unlimited = resource.RLIM_INFINITY

    def limit(kind: int) -> tuple[int, int]:
        assert decoder.pid is not None
        return resource.prlimit(decoder.pid, kind)

    assert limit(resource.RLIMIT_CORE) == (0, 0)
    assert limit(resource.RLIMIT_NOFILE) == (128, 128)
    written = largest_answer_bytes(MEDIA) + (1 << 20)
    assert limit(resource.RLIMIT_FSIZE) == (written, written)
    space, hard = limit(resource.RLIMIT_AS)
    assert space == hard != unlimited
    assert LIMITS.memory_limit_bytes < space < 64 << 30
    cpu_s, hard = limit(resource.RLIMIT_CPU)
    assert 20 < cpu_s < 60  # what was used, and the deadline
    assert hard == unlimited


def test_cpu_time_that_runs_out_costs_one_video(decoder: DecoderProcess, folder: Path) -> None:
    path = folder / "slow.mkv"
    clips.encode(path, codec="mjpeg", size=(3840, 2160), num_frames=30)
    decoder.start()
    pid = decoder.pid
    assert pid is not None
    while _cpu_seconds(pid) < 1:
        decoder.decode(path)
    unset = (10**6, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_CPU, unset)

    def use_up() -> None:
        while resource.prlimit(pid, resource.RLIMIT_CPU) == unset:
            time.sleep(0.001)  # the child sets its own when it takes the file
        # Used up already: a limit that the decoding has to reach, a fast machine does not reach.
        resource.prlimit(pid, resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))

    thread = threading.Thread(target=use_up)
    thread.start()
    with pytest.raises(DecodeError) as caught:
        decoder.decode(path)
    thread.join()
    assert caught.value.error_type in ("probe_timeout", "decode_timeout")
    assert decoder.decode(clips.render(folder, ["carphone.mp4"])["carphone.mp4"]).frames
    assert decoder.pid != pid


def _cpu_seconds(pid: int) -> float:
    # proc(5): the fields behind the name, of which the 12th and 13th are user and system time.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("said", ["nonsense", "[1]", "x" * (2 << 20)])
def test_a_child_that_talks_nonsense_costs_one_video(said: str, folder: Path) -> None:
    process = DecoderProcess(MEDIA, LIMITS)
    script = f"read line; echo '{{\"taken\": true}}'; head -c {len(said)} said; echo; sleep 60"
    (folder / "said").write_text(said)
    process._child = subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
    )
    path = clips.render(folder, ["carphone.mp4"])["carphone.mp4"]
    with pytest.raises(DecodeError) as caught:
        process.decode(path)
    assert caught.value.error_type == "decode_crash"
    assert process.decode(path).frames
    process.close()


def test_no_answer_is_larger_than_what_may_be_written() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20_000):
        low, high = np.sort(generator.integers(784, 1 << 20, size=2))
        media = MediaConfig(min_pixels=int(low), max_pixels=int(high), max_frames=2)
        height = int(generator.integers(1, 9000))
        width = int(min(9000, max(1, height * MAX_ASPECT ** generator.uniform(-1, 1))))
        if max(height, width) > MAX_ASPECT * min(height, width):
            continue
        rows, columns = frame_size(height, width, min_pixels=int(low), max_pixels=int(high))
        assert 2 * rows * columns * 3 + 300 * 16_000 * 4 <= largest_answer_bytes(media)
