"""Windows of a long file, against the whole file decoded in turn and against files that are cut."""

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from omnisift.media import frame_size, resize_frames
from pipeline import keys, rows
from pipeline.boundary import Roots
from pipeline.config import DecodeConfig, MediaConfig, StorageConfig
from pipeline.decoder_process import DecodedBytes, DecoderProcess
from pipeline.film import Film, decode_file
from pipeline.media_index import DecodeError
from pipeline.media_sound import SoundReader
from pipeline.media_windows import Window
from pipeline.stages.decode import Decode
from pipeline.testing.clips import encode, repeat

WINDOW_S = 4.0
WHOLE = MediaConfig(min_pixels=56 * 56, max_pixels=112 * 112)
CUT = replace(WHOLE, window_s=WINDOW_S)
LIMITS = DecodeConfig(probe_s=60, deadline_s=60)
SPANS = [(0.0, 4.0), (4.0, 8.0), (8.0, 12.0), (12.0, 15.36)]
RATE = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


@pytest.fixture(scope="module")
def film(folder: Path) -> Path:
    """15.36 s with sound and moving pictures; 44.1 kHz does not divide 16 kHz."""
    encode(folder / "short.mp4", num_frames=128, key_every=40, sound="aac")
    return repeat(folder / "short.mp4", folder / "film.mp4", 15.36)


@pytest.fixture(scope="module")
def pictures(film: Path) -> list[VideoFrame]:
    """Every picture, decoded in turn."""
    with av.open(str(film)) as container:
        return list(container.decode(video=0))


@pytest.fixture
def process() -> Iterator[DecoderProcess]:
    process = DecoderProcess(CUT, LIMITS)
    yield process
    process.close()


def decode_all(path: Path, media: MediaConfig = CUT) -> list[tuple[Window, Any]]:
    film = Film(path, media, LIMITS)
    with film.sound() as sound:
        return [(window, film.decode(window, sound)) for window in film.windows]


def cut_file(path: Path, pictures: list[VideoFrame], start_s: float, end_s: float) -> Path:
    """Write the pictures of a span as a file of their own, without loss and without sound."""
    chosen = pictures[round(start_s * RATE) : round(end_s * RATE)]
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = (
            chosen[0].width,
            chosen[0].height,
            chosen[0].format.name,
        )
        for number, picture in enumerate(chosen):
            frame = VideoFrame.from_ndarray(picture.to_ndarray(), format=picture.format.name)
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def test_windows_hold_the_pictures_of_their_span(film: Path, pictures: list[VideoFrame]) -> None:
    found = decode_all(film)
    assert [(window.start_s, window.end_s) for window, _ in found] == SPANS
    for (start_s, end_s), (_, decoded) in zip(SPANS, found, strict=True):
        count = int((end_s - start_s) * 2) // 2 * 2
        assert (decoded.duration_s, decoded.fps) == (end_s - start_s, 2.0)
        wanted = [pictures[int((start_s + number / 2) * RATE)] for number in range(count)]
        images = np.stack([picture.to_ndarray(format="rgb24") for picture in wanted])
        height, width = images.shape[1:3]
        size = frame_size(height, width, min_pixels=WHOLE.min_pixels, max_pixels=WHOLE.max_pixels)
        expected = resize_frames(torch.from_numpy(images), size).numpy()
        assert np.array_equal(decoded.frames, expected)


def test_a_window_equals_a_file_that_was_cut_there(
    film: Path, pictures: list[VideoFrame], tmp_path: Path
) -> None:
    for (start_s, end_s), (_, decoded) in zip(SPANS, decode_all(film), strict=True):
        path = cut_file(tmp_path / f"{start_s}.mkv", pictures, start_s, end_s)
        alone = decode_file(path, WHOLE, LIMITS)
        assert np.array_equal(decoded.frames, alone.frames)
        assert (decoded.fps, round(decoded.duration_s, 2)) == (
            alone.fps,
            round(alone.duration_s, 2),
        )


def whole_sound(path: Path) -> NDArray[np.float32]:
    return decode_file(path, WHOLE, LIMITS).audio


@pytest.mark.parametrize("rate", [48_000, 44_100])
def test_windows_hold_the_samples_of_their_span(film: Path, tmp_path: Path, rate: int) -> None:
    path = film
    if rate != 48_000:
        path = tmp_path / "other_rate.mkv"
        _with_sound_at(film, path, rate)
    sound = whole_sound(path)
    assert len(sound) > 15 * 16_000
    parts = []
    for (start_s, _), (window, decoded) in zip(SPANS, decode_all(path), strict=True):
        start = round(start_s * 16_000)
        end = len(sound) if window.is_last else round(window.end_s * 16_000)
        assert np.array_equal(decoded.audio, sound[start:end])
        assert decoded.has_audio
        parts.append(decoded.audio)
    assert np.array_equal(np.concatenate(parts), sound)


def _with_sound_at(film: Path, path: Path, rate: int) -> None:
    """Copy pictures, and put noise beside them whose rate is no multiple of 16 kHz."""
    noise = np.random.default_rng(0).normal(0, 0.2, (1, round(15.36 * rate))).astype(np.float32)
    with av.open(str(film)) as source, av.open(str(path), "w") as output:
        video = output.add_stream_from_template(source.streams.video[0])
        sound: Any = output.add_stream("pcm_f32le", rate=rate, layout="mono")
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = video
                output.mux(packet)
        for start in range(0, noise.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(noise[:, start : start + 1024]), format="flt", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            output.mux(sound.encode(frame))
        output.mux(sound.encode(None))


def test_sound_that_begins_late_is_where_it_is_heard(folder: Path) -> None:
    encode(folder / "late.mp4", num_frames=400, sound="aac", sound_delay_s=9.0)
    sound = whole_sound(folder / "late.mp4")
    first, second, third, fourth = (decoded for _, decoded in decode_all(folder / "late.mp4"))
    assert (first.has_audio, len(first.audio)) == (False, 0)
    assert not second.has_audio
    assert third.has_audio
    assert not third.audio[:15_900].any()
    assert np.array_equal(third.audio, sound[8 * 16_000 : 8 * 16_000 + len(third.audio)])
    rest = sound[12 * 16_000 :]
    assert np.array_equal(fourth.audio, rest)


def test_silent_windows_have_no_sound(tmp_path: Path) -> None:
    encode(tmp_path / "silent.mp4", num_frames=250)
    assert [decoded.has_audio for _, decoded in decode_all(tmp_path / "silent.mp4")] == [False] * 2


def test_spans_of_sound_may_be_left_out(film: Path) -> None:
    sound = whole_sound(film)
    with av.open(str(film)) as container:
        reader = SoundReader(container, origin_s=0.0)
        for start_s, end_s in ((1.5, 2.25), (2.25, 2.5), (9.0, 11.0)):
            part = reader.read(start_s, end_s)
            assert part is not None
            assert np.array_equal(part, sound[round(start_s * 16_000) : round(end_s * 16_000)])
        assert reader.read(20.0, 24.0) is None


def found_by(
    process: DecoderProcess, path: Path, skip: tuple[int, ...] = ()
) -> Iterator[tuple[Window, DecodedBytes | DecodeError]]:
    for window, found in process.decode_windows(path, skip):
        assert window is not None
        yield window, found


def test_the_child_gives_what_decoding_here_gives_without_what_is_skipped(
    process: DecoderProcess, film: Path
) -> None:
    expected = decode_all(film)
    for skip in ((), (0,), (1, 3), (0, 1, 2), (0, 1, 2, 3)):
        wanted = [pair for pair in expected if pair[0].number not in skip]
        found = list(found_by(process, film, skip))
        assert [window for window, _ in found] == [window for window, _ in wanted]
        for (_, got), (_, want) in zip(found, wanted, strict=True):
            assert isinstance(got, DecodedBytes)
            assert got.frames == want.frames.tobytes()
            assert got.audio == want.audio.tobytes()
            assert (got.duration_s, got.fps) == (want.duration_s, want.fps)


def test_a_file_may_be_left_in_the_middle(process: DecoderProcess, film: Path) -> None:
    expected = next(iter(found_by(process, film)))
    child = process.pid
    for _ in range(3):
        windows = found_by(process, film)
        assert next(windows) == expected
        next(windows)
        del windows
    assert process.pid == child


def test_a_child_that_dies_in_a_window_costs_it_and_those_behind_it(
    process: DecoderProcess, film: Path
) -> None:
    windows = found_by(process, film)
    first = next(windows)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    rest = list(windows)
    assert [window.number for window, _ in rest] == [1, 2, 3]
    for _, error in rest:
        assert isinstance(error, DecodeError)
        assert error.error_type == "decode_crash"
    again = list(found_by(process, film))
    assert again[0] == first
    assert len(again) == 4


def damage(film: Path, path: Path, start_s: float, end_s: float) -> Path:
    """Copy a file with noise in place of the pictures of a span."""
    generator = np.random.default_rng(0)
    with av.open(str(film)) as source, av.open(str(path), "w") as output:
        copies = {
            stream.index: output.add_stream_from_template(stream) for stream in source.streams
        }
        for packet in source.demux():
            if packet.dts is None:
                continue
            moment_s = float((packet.pts or 0) * packet.time_base)
            noisy = packet.stream.type == "video" and start_s <= moment_s < end_s
            copy = av.Packet(generator.bytes(packet.size) if noisy else bytes(packet))
            copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
            copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
            copy.stream = copies[packet.stream.index]
            output.mux(copy)
    return path


def test_a_damaged_span_costs_its_windows_alone(
    process: DecoderProcess, film: Path, tmp_path: Path
) -> None:
    path = damage(film, tmp_path / "damaged.mp4", 3.9, 8.3)
    found = dict(found_by(process, path))
    kinds = [type(each) for each in found.values()]
    assert kinds[0] is DecodedBytes
    assert kinds[1] is DecodeError
    assert kinds[3] is DecodedBytes
    sound = whole_sound(film)
    last = list(found.values())[3]
    assert isinstance(last, DecodedBytes)
    assert np.array_equal(np.frombuffer(last.audio, np.float32), sound[12 * 16_000 :])


def test_the_stage_makes_a_row_of_each_window(film: Path, tmp_path: Path) -> None:
    roots = Roots((str(film.parent),), None)
    stage = Decode(CUT, DecodeConfig(temp_dir=str(tmp_path)), StorageConfig(), roots)
    identity = {
        "video_key": "key",
        "object_key": "key",
        "uri": str(film),
        "size_bytes": film.stat().st_size,
        "etag": "",
        "prompts": [],
        "attempts": 1,
        "window_s": WINDOW_S,
    }
    short = identity | {"uri": str(film.parent / "short.mp4"), "video_key": "short"}
    short["size_bytes"] = (film.parent / "short.mp4").stat().st_size
    bad = rows.failed(identity | {"video_key": "bad"}, "source", "not_found", "gone")
    given = [identity, short, identity | {"skip_windows": [0, 2]}, bad]
    try:
        blocks = list(stage(rows.build(given, rows.IDENTITY)))
    finally:
        stage.close()
    assert [block.num_rows for block in blocks] == [1] * 8  # no two are in memory together
    made = list(rows.iterate(pa.concat_tables(blocks)))
    window_keys = [keys.window_key("key", WINDOW_S, n, last=n == 3) for n in range(4)]
    expected: list[tuple[str, float | None, int | None]] = [
        (key, start, 4) for key, (start, _) in zip(window_keys, SPANS, strict=True)
    ]
    expected += [("short", None, None)]
    expected += [(window_keys[n], SPANS[n][0], 2) for n in (1, 3)]
    expected += [("bad", None, None)]
    assert [(row["video_key"], row["start_s"], row["windows"]) for row in made] == expected
    assert {row["object_key"] for row in made} == {"key"}
    decoded = [each for _, each in decode_all(film)]
    for row, each in zip(made, decoded, strict=False):
        assert bytes(row["frames"]) == each.frames.tobytes()
        assert row["duration_s"] == each.duration_s
    assert [row["error_type"] for row in made] == [None] * 7 + ["not_found"]
    assert all(row["decode_s"] > 0 for row in made[:-1])


def test_a_damaged_window_is_a_failed_row_that_says_which(film: Path, tmp_path: Path) -> None:
    path = damage(film, tmp_path / "damaged.mp4", 3.9, 8.3)
    stage = Decode(
        CUT, DecodeConfig(temp_dir=str(tmp_path)), StorageConfig(), Roots((str(tmp_path),), None)
    )
    given = {
        "video_key": "key",
        "uri": str(path),
        "size_bytes": path.stat().st_size,
        "window_s": WINDOW_S,
    }
    try:
        blocks = stage(rows.build([given], rows.IDENTITY))
        made = list(itertools.chain.from_iterable(map(rows.iterate, blocks)))
    finally:
        stage.close()
    assert len(made) == 4
    assert made[1]["error_type"] == "decode_error"
    assert made[1]["error_message"].startswith(f"{path}, 4 to 8 s: the picture at ")
    assert (made[1]["start_s"], made[1]["duration_s"], made[1]["windows"]) == (4.0, 4.0, 4)
    assert made[3]["error_type"] is None
