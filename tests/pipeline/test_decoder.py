"""What decoding yields, against PyAV reading every frame and picking by a plain loop."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.signal import resample_poly  # type: ignore[import-untyped]

from omnisift.media import SAMPLE_RATE, sample_times
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.film import Decoded, decode_file
from pipeline.media_frames import FrameReader
from pipeline.media_index import DecodeError, index_video, open_media, video_stream
from pipeline.testing import clips

MEDIA = MediaConfig()
LIMITS = DecodeConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("clips")


def decode(folder: Path, name: str, media: MediaConfig = MEDIA) -> Decoded:
    path = clips.render(folder, [name])[name]
    return decode_file(path, media, LIMITS)


def every_frame(path: Path) -> tuple[list[Fraction], list[NDArray[np.uint8]]]:
    """Decode it all: start (s) and picture of each frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            ((frame.pts or 0) * (stream.time_base or Fraction(1)), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(stream)
        ]
    return [start for start, _ in frames], [picture.astype(np.uint8) for _, picture in frames]


@pytest.mark.parametrize("name", ["h264_sound.mp4", "vp9_opus.webm", "av1.mp4", "rotated.mp4"])
def test_decord_reads_the_same_where_it_is_right(folder: Path, name: str) -> None:
    ours = decode(folder, name)
    theirs = decode(folder, name, MediaConfig(reader="decord"))
    assert np.array_equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.audio, theirs.audio)


def test_decord_says_what_it_cannot_read(folder: Path) -> None:
    with pytest.raises(DecodeError, match=r"decord cannot read it .* media\.reader=pyav"):
        decode(folder, "one_pixel.mkv", MediaConfig(reader="decord"))


def on_display(starts: list[Fraction], time_s: float) -> int:
    shown = 0
    for number, start in enumerate(starts):
        if start - starts[0] <= Fraction(time_s).limit_denominator(1_000_000):
            shown = number
    return shown


@pytest.mark.parametrize(
    "name",
    [
        "h264_sound.mp4",
        "vp9_opus.webm",
        "hevc.mp4",
        "av1.mp4",
        "mpeg4.avi",
        "transport.ts",
        "variable_rate.mp4",
        "carphone.mp4",
        "one_pixel.mkv",
        "single_frame.mp4",
    ],
)
@pytest.mark.parametrize("fps", [2.0, 7.0])
def test_frames_are_those_on_display_at_the_sample_times(
    folder: Path, name: str, fps: float
) -> None:
    decoded = decode(folder, name, MediaConfig(fps=fps))

    starts, pictures = every_frame(folder / name)
    times_s, rate = sample_times(decoded.duration_s, fps=fps, max_frames=256)
    height, width = decoded.frames.shape[1:3]
    assert decoded.fps == rate
    assert len(decoded.frames) == len(times_s)
    for frame, time_s in zip(decoded.frames, times_s, strict=True):
        picture = Image.fromarray(pictures[on_display(starts, float(time_s))])
        expected = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        difference = np.abs(frame.astype(int) - expected.astype(int))
        # Pillow's bicubic has a = -0.5 as torch's with antialiasing; its rounding differs by a bit.
        assert difference.max() <= 3
        assert difference.mean() < 0.1


def test_variable_rate_is_read_by_time_and_not_by_count(folder: Path) -> None:
    decoded = decode(folder, "variable_rate.mp4")
    starts, _ = every_frame(folder / "variable_rate.mp4")
    by_time = [on_display(starts, 0.5 * number) for number in range(len(decoded.frames))]
    by_count = [round(number * len(starts) / len(decoded.frames)) for number in range(len(by_time))]
    assert by_time != by_count  # the clip tells the two apart
    assert decoded.duration_s == pytest.approx(float(starts[-1]) + 1 / 25, abs=0.1)


@pytest.mark.parametrize("name", ["h264_sound.mp4", "transport.ts", "hevc.mp4", "mpeg4.avi"])
def test_seeking_gives_the_frames_that_decoding_everything_gives(folder: Path, name: str) -> None:
    path = clips.render(folder, [name])[name]
    _, pictures = every_frame(path)
    with open_media(path) as container:
        index = index_video(container, video_stream(container))
    count = len(index.starts)
    for numbers in ([0, count - 1], [count // 2], [3, 4, 5, 51, count - 2], [49, 50, 51]):
        with open_media(path) as container:
            reader = FrameReader(container, video_stream(container), index)
            for number in numbers:
                read = reader.read(number).to_ndarray(format="rgb24")
                assert np.array_equal(read, pictures[number]), number


def test_sparse_samples_leave_what_lies_between_undecoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.mp4"
    clips.encode(path, size=(64, 36), num_frames=1000, key_every=10)
    decoded = 0
    forward = FrameReader._decode

    def counting(self: FrameReader) -> object:
        nonlocal decoded
        for frame in forward(self):
            decoded += 1
            yield frame

    monkeypatch.setattr(FrameReader, "_decode", counting)
    result = decode_file(path, MediaConfig(max_frames=10), LIMITS)
    assert len(result.frames) == 10
    assert decoded <= 10 * 13  # a group of pictures each, and what the decoder reorders


def test_rotated_video_is_upright(folder: Path) -> None:
    decoded = decode(folder, "rotated.mp4")
    _, pictures = every_frame(folder / "rotated.mp4")
    height, width = decoded.frames.shape[1:3]
    assert height > width  # it lies 16:9 in the file
    # rotated.mp4 asks for a quarter turn clockwise: the left column becomes the top row.
    upright = Image.fromarray(pictures[0]).transpose(Image.Transpose.ROTATE_270)
    expected = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC))
    assert np.abs(decoded.frames[0].astype(int) - expected.astype(int)).mean() < 0.1


def test_a_single_frame_is_shown_twice(folder: Path) -> None:
    decoded = decode(folder, "single_frame.mp4")
    assert len(decoded.frames) == 2
    assert np.array_equal(decoded.frames[0], decoded.frames[1])


def test_huge_frames_fit(folder: Path) -> None:
    assert decode(folder, "huge_frames.mp4").frames.shape == (2, 336, 588, 3)


def reference_sound(path: Path) -> NDArray[np.float64]:
    """Mean of the channels at 16 kHz, resampled by SciPy."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    mono = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in frames])
    resampled: NDArray[np.float64] = resample_poly(mono, 1, frames[0].sample_rate // SAMPLE_RATE)
    return resampled


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "h264_sound.mp4", "vp9_opus.webm"])
def test_sound_is_the_mean_of_the_channels_at_16_khz(folder: Path, name: str) -> None:
    sound = decode(folder, name).audio
    expected = reference_sound(folder / name)
    assert sound.dtype == np.float32
    assert abs(len(sound) - len(expected)) <= 160
    length = min(len(sound), len(expected))
    error = sound[:length] - expected[:length]
    # Two resamplers differ near 8 kHz; a sample of delay would already be 10 times this.
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(expected**2))


def test_sound_of_many_channels_is_their_mean(folder: Path) -> None:
    path = folder / "sixteen.mkv"
    levels = np.arange(16, dtype=np.int16) * 1000
    with av.open(str(path), "w") as output:
        video: Any = output.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        sound: Any = output.add_stream("pcm_s16le", rate=SAMPLE_RATE)
        sound.codec_context.layout = "hexadecagonal"
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 32), np.uint8), format="yuv420p")
        for number in range(25):
            picture.pts = number
            output.mux(video.encode(picture))
        samples = np.tile(levels, SAMPLE_RATE)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="hexadecagonal")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        output.mux(sound.encode(frame))
        output.mux(video.encode(None))
        output.mux(sound.encode(None))
    decoded = decode_file(path, MEDIA, LIMITS)
    assert len(decoded.audio) == SAMPLE_RATE
    assert np.allclose(decoded.audio, levels.mean() / 32768, atol=1e-4)


def test_sound_that_starts_late_is_preceded_by_silence(folder: Path) -> None:
    late = decode(folder, "late_sound.mp4").audio
    sound = decode(folder, "h264_sound.mp4").audio
    # The delay in the file is a second less the encoder's own lead of 1024 samples at 48 kHz.
    lags = range(SAMPLE_RATE - 400, SAMPLE_RATE + 400)
    scores = [float(late[lag : lag + 48_000] @ sound[:48_000]) for lag in lags]
    assert abs(lags[int(np.argmax(scores))] - SAMPLE_RATE) <= 342
    assert not np.any(late[: SAMPLE_RATE - 400])


def test_sound_is_cut_at_the_limit(folder: Path) -> None:
    whole = decode(folder, "h264_sound.mp4").audio
    cut = decode(folder, "h264_sound.mp4", MediaConfig(max_audio_s=1.5)).audio
    assert len(cut) == 1.5 * SAMPLE_RATE
    assert np.array_equal(cut, whole[: len(cut)])


def test_a_stream_of_zeros_is_sound_and_no_stream_is_not(folder: Path) -> None:
    zeros = decode(folder, "silence.mp4")
    assert zeros.has_audio
    assert len(zeros.audio) > 5 * SAMPLE_RATE
    assert not np.any(zeros.audio)
    without = decode(folder, "bikes.mp4")
    assert not without.has_audio
    assert len(without.audio) == 0


@pytest.mark.parametrize(
    ("name", "error_type", "said"),
    [
        ("empty.mp4", "not_a_video", "an empty file"),
        ("page.mp4", "not_a_video", "an HTML page"),
        ("moov_missing.mp4", "not_a_video", "'moov'"),
        ("no_frames.mkv", "not_a_video", "End of file"),
        ("audio_only.m4a", "no_video_stream", "found audio"),
        ("truncated.mp4", "truncated", "states 5.00 s of video but holds 2."),
    ],
)
def test_a_bad_file_is_named_for_what_it_is(
    folder: Path, name: str, error_type: str, said: str
) -> None:
    with pytest.raises(DecodeError, match=said) as caught:
        decode(folder, name)
    assert caught.value.error_type == error_type


def test_flipped_bits_end_in_frames_or_in_a_clear_error(folder: Path) -> None:
    whole = clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"].read_bytes()
    generator = np.random.default_rng(1)
    types = set()
    for trial in range(12):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        data[generator.integers(0, len(data), size=1 + 40 * trial)] ^= 0x10
        path = folder / "flipped.mp4"
        path.write_bytes(data.tobytes())
        try:
            decoded = decode_file(path, MEDIA, LIMITS)
        except DecodeError as error:
            types.add(error.error_type)
        else:
            assert decoded.frames.shape[0] >= 2
    assert types <= {"not_a_video", "no_video_stream", "truncated", "decode_error", "too_large"}


def test_frames_beyond_the_limits_are_refused_before_they_are_decoded(folder: Path) -> None:
    path = clips.render(folder, ["h264_sound.mp4"])["h264_sound.mp4"]
    with pytest.raises(DecodeError, match="320x180 are more than the 1000 pixels") as caught:
        decode_file(path, MEDIA, DecodeConfig(max_source_pixels=1000))
    assert caught.value.error_type == "too_large"
    clips.encode(folder / "strip.mkv", codec="ffv1", size=(804, 4), num_frames=2)
    with pytest.raises(DecodeError, match="200 times as long as wide"):
        decode_file(folder / "strip.mkv", MEDIA, LIMITS)


def test_a_playlist_opens_nothing_else(folder: Path) -> None:
    target = clips.render(folder, ["transport.ts"])["transport.ts"]
    playlist = folder / "list.mp4"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{target}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(DecodeError) as caught:
        decode_file(playlist, MEDIA, LIMITS)
    assert caught.value.error_type == "not_a_video"


def test_decoding_leaves_no_file_open(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("h264_sound.mp4", "truncated.mp4", "page.mp4"):
        try:
            decode(folder, name)
        except DecodeError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before
