"""The GPU's video engines against the CPU: the same pictures, and the CPU's where they cannot."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from av.codec.hwaccel import HWAccel
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from numpy.typing import NDArray

from pipeline import media_nvdec, rows
from pipeline.boundary import Roots
from pipeline.config import CaptionConfig, DecodeConfig, MediaConfig, StorageConfig
from pipeline.decoder_process import DecodedBytes, DecoderProcess
from pipeline.film import Film, decode_file
from pipeline.media_frames import FrameReader, read_frames
from pipeline.media_index import DecodeError, index_video, open_media, video_stream
from pipeline.media_nvdec import Nvdec, NvdecError, _take_slot
from pipeline.stages.decode import Decode
from pipeline.testing import clips

MEDIA = MediaConfig(fps=5.0)
NVDEC = DecodeConfig(nvdec=True, deadline_s=60)
BOTH = {"on": NVDEC, "off": replace(NVDEC, nvdec=False)}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
with_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# What the engines take, with everything that H.264 may do to the order and the shape of pictures.
TAKEN: dict[str, dict[str, Any]] = {
    "b_frames.mp4": {"options": {"preset": "medium"}},
    "open_gop.mp4": {"options": {"preset": "medium", "x264-params": "open-gop=1:keyint=25"}},
    "interlaced.mp4": {"options": {"x264-params": "interlaced=1:tff=1"}},
    "full_range.mp4": {"pixels": "yuvj420p"},
    "odd_size.mp4": {"size": (426, 238)},
    "tiny.mp4": {"size": (34, 18)},
    "rotated.mp4": {"rotation": -90},
    "sound.mp4": {"sound": "aac"},
    "transport.ts": {"sound": "aac"},
    "hevc.mp4": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9"},
}
NOT_TAKEN: dict[str, dict[str, Any]] = {
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "ten_bits_hevc.mp4": {"codec": "libx265", "pixels": "yuv420p10le"},
    "lossless.mp4": {"options": {"qp": "0"}},
    "half_chroma.mp4": {"pixels": "yuv422p"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "av1.mp4": {"codec": "libsvtav1", "num_frames": 25},
    "lossless.mkv": {"codec": "ffv1"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("nvdec")


def clip(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        clips.encode(path, **(TAKEN | NOT_TAKEN)[name])
    return path


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, DecoderProcess]]:
    """Children that decode, one with NVDEC and one without."""
    processes = {name: DecoderProcess(MEDIA, limits) for name, limits in BOTH.items()}
    yield processes
    for process in processes.values():
        process.close()


def same(left: DecodedBytes, right: DecodedBytes) -> bool:
    return replace(left, nvdec=None) == replace(right, nvdec=None)


@pytest.mark.parametrize("name", list(TAKEN | NOT_TAKEN))
def test_what_the_engines_take(folder: Path, name: str) -> None:
    with open_media(clip(folder, name)) as container:
        assert Nvdec.takes(video_stream(container)) == (name in TAKEN)


@without_gpu
def test_without_a_gpu_the_cpu_decodes_and_a_warning_says_so(
    folder: Path, processes: dict[str, DecoderProcess], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NvdecError, match="CUDA shows no GPU"):
        Nvdec()
    path = clip(folder, "b_frames.mp4")
    with caplog.at_level(logging.WARNING):
        asked = processes["on"].decode(path)
    assert "decode.nvdec=true, but the CPU decodes here: CUDA shows no GPU" in caplog.text
    plain = processes["off"].decode(path)
    assert same(asked, plain)
    assert (asked.nvdec, plain.nvdec) == (False, None)


def test_a_build_without_nvdec_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # a device on which FFmpeg decodes no H.264 stands in for a build without NVDEC
    monkeypatch.setattr(media_nvdec, "HWAccel", lambda _, **keys: HWAccel("drm", **keys))
    with pytest.raises(NvdecError, match="has no NVDEC"):
        Nvdec()


@without_gpu
def test_a_file_that_the_engines_fail_at_is_decoded_by_the_cpu(folder: Path) -> None:
    path = clip(folder, "b_frames.mp4")
    broken: Any = SimpleNamespace(accel=HWAccel("cuda"), takes=Nvdec.takes)
    with pytest.raises(DecodeError):  # what stands in for a broken driver
        open_media(path, broken.accel)
    film = Film(path, MEDIA, NVDEC, nvdec=broken)
    with film.sound() as sound:
        found = film.decode(film.windows[0], sound)
    assert found.nvdec is False
    assert found.nvdec_failed
    assert np.array_equal(found.frames, decode_file(path, MEDIA, DecodeConfig()).frames)


# For the child alone, which imports it before anything else.
BROKEN_NVDEC = """
from av.codec.hwaccel import HWAccel
import pipeline.media_nvdec

class Broken:
    takes = staticmethod(pipeline.media_nvdec.Nvdec.takes)
    accel = HWAccel("cuda")

pipeline.media_nvdec.Nvdec = Broken
"""


@pytest.fixture
def broken_nvdec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_NVDEC)
    monkeypatch.syspath_prepend(str(tmp_path))


@without_gpu
@pytest.mark.usefixtures("broken_nvdec")
def test_a_gpu_that_failed_is_met_by_a_new_process(folder: Path) -> None:
    process = DecoderProcess(MEDIA, NVDEC)
    failed = []
    try:
        pids = []
        for name in ("mpeg4.mp4", "b_frames.mp4", "mpeg4.mp4", "sound.mp4", "b_frames.mp4"):
            path = clip(folder, name)
            process.start()
            pids.append(process.pid)
            found = process.decode(path)
            failed.append(found.nvdec_failed)
            assert found.nvdec is False
            assert np.array_equal(
                np.frombuffer(found.frames, np.uint8),
                decode_file(path, MEDIA, DecodeConfig()).frames.ravel(),
            )
    finally:
        process.close()
    # what NVDEC does not take says nothing of it
    assert failed == [False, True, False, True, True]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


@without_gpu
@pytest.mark.usefixtures("broken_nvdec")
def test_the_log_names_the_video_that_a_gpu_failed_at(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Decode(MEDIA, NVDEC, StorageConfig(attempts=1), Roots((str(folder),), None))
    try:
        for name in ("mpeg4.mp4", "b_frames.mp4", "sound.mp4"):
            path = clip(folder, name)
            row = {"video_key": name, "uri": str(path), "size_bytes": path.stat().st_size}
            block = rows.build([{**row, "etag": "", "attempts": 1}], rows.IDENTITY)
            [decoded] = [row for part in stage(block) for row in part.to_pylist()]
            assert (decoded["error_type"], decoded["nvdec"]) == (None, False)
    finally:
        stage.close()
    said = [line for line in caplog.messages if "NVDEC failed, so the CPU decoded it" in line]
    assert [line.partition(":")[0] for line in said] == [
        str(clip(folder, name)) for name in ("b_frames.mp4", "sound.mp4")
    ]


def as_a_gpu_has_it(frame: VideoFrame) -> VideoFrame:
    """Return the picture in NV12: the two chroma planes side by side, pixel for pixel."""

    def pixels(plane: VideoPlane) -> NDArray[np.uint8]:
        return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)

    luma, blue, red = (pixels(plane)[:, : plane.width] for plane in frame.planes)
    other = VideoFrame(frame.width, frame.height, "nv12")
    pixels(other.planes[0])[:, : luma.shape[1]] = luma
    chroma = np.stack([blue, red], axis=-1).reshape(len(blue), -1)
    pixels(other.planes[1])[:, : chroma.shape[1]] = chroma
    other.pts, other.time_base = frame.pts, frame.time_base
    other.color_range, other.colorspace = frame.color_range, frame.colorspace
    return other


@pytest.mark.parametrize("name", ["b_frames.mp4", "full_range.mp4", "odd_size.mp4"])
def test_colours_are_those_of_the_cpu(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> list[NDArray[np.uint8]]:
        with open_media(clip(folder, name)) as container:
            stream = video_stream(container)
            return list(read_frames(container, stream, index_video(container, stream), range(20)))

    planes = read()
    plain = FrameReader.read
    monkeypatch.setattr(
        FrameReader, "read", lambda self, number: as_a_gpu_has_it(plain(self, number))
    )
    assert all(np.array_equal(left, right) for left, right in zip(planes, read(), strict=True))


def test_decoders_of_a_machine_have_numbers_of_their_own() -> None:
    first, second, third = (_take_slot() for _ in range(3))
    assert len({first[1], second[1], third[1]}) == 3
    second[0].close()
    again = _take_slot()
    assert again[1] == second[1]  # what a dead decoder had
    for held, _ in (first, third, again):
        held.close()


def test_decord_and_nvdec_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"media\.reader.*'pyav', as decode\.nvdec=true"):
        CaptionConfig(source="s", output="o", media=MediaConfig(reader="decord"), decode=NVDEC)


@pytest.mark.parametrize("name", [pytest.param(name, marks=with_gpu) for name in TAKEN])
def test_pictures_are_those_of_the_cpu(
    folder: Path, processes: dict[str, DecoderProcess], name: str
) -> None:
    asked, plain = (processes[which].decode(clip(folder, name)) for which in ("on", "off"))
    assert (asked.nvdec, plain.nvdec) == (True, None)
    assert same(asked, plain)


@pytest.mark.parametrize("name", [pytest.param(name, marks=with_gpu) for name in NOT_TAKEN])
def test_what_they_do_not_take_the_cpu_decodes(
    folder: Path, processes: dict[str, DecoderProcess], name: str
) -> None:
    asked, plain = (processes[which].decode(clip(folder, name)) for which in ("on", "off"))
    assert asked.nvdec is False
    assert same(asked, plain)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=with_gpu)
        for name in ("truncated.mp4", "bit_flipped.mp4", "variable_rate.mp4", "single_frame.mp4")
    ],
)
def test_a_damaged_or_uneven_file_has_the_same_fate(
    folder: Path, processes: dict[str, DecoderProcess], name: str
) -> None:
    def fate(process: DecoderProcess) -> Any:
        try:
            found = process.decode(clips.render(folder, [name])[name])
        except DecodeError as error:
            return error.error_type
        return found.frames_shape, found.audio, found.duration_s

    assert fate(processes["on"]) == fate(processes["off"])
    asked, plain = (processes[which].decode(clip(folder, "sound.mp4")) for which in ("on", "off"))
    assert asked.nvdec is True  # the file behind it is unharmed
    assert same(asked, plain)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=with_gpu) for seed in range(8)])
def test_noise_in_a_file_costs_that_file_alone(
    folder: Path, processes: dict[str, DecoderProcess], seed: int
) -> None:
    data = bytearray(clip(folder, "b_frames.mp4").read_bytes())
    random = np.random.default_rng(seed)
    for place in random.integers(len(data) // 4, len(data), size=30):
        data[place] ^= 0xFF
    path = folder / f"noise-{seed}.mp4"
    path.write_bytes(data)
    with contextlib.suppress(DecodeError):
        assert processes["on"].decode(path).frames_shape[-1] == 3
    asked, plain = (processes[which].decode(clip(folder, "sound.mp4")) for which in ("on", "off"))
    assert asked.nvdec is True
    assert same(asked, plain)
