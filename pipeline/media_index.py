"""Open a file of unknown content as media, and list when each frame of its video is shown."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from omnisift.media import MAX_ASPECT

# Demuxers that hold one video each. Left out on purpose: playlists (hls, dash, concat, sdp), which
# make a file from a stranger open other files and addresses, and formats that take any text or
# image.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,ivf,h264,hevc,av1,obu,"
    "m4v,mxf,gxf,nut,rm,dv,swf,wtv,vob,y4m,yuv4mpegpipe,mp3,wav,flac,aac,amr,aiff,caf,gif,apng,w64"
)
# A demuxer that is led elsewhere all the same (an MP4 may name other files as its tracks) opens no
# address. FFmpeg counts streams of its own, as memory: over its limit a file looks like a shortage.
_OPTIONS = {
    "format_whitelist": _DEMUXERS,
    "protocol_whitelist": "file",
    "enable_drefs": "0",
    "max_streams": "100000",
}
# How reading packets ends before its time. IndexError: PyAV, behind the last packet, counts streams
# that appeared in the middle of an MPEG-TS; by then every packet has been handed on.
ENDS = (av.FFmpegError, IndexError)
_LATEST_SHORTFALL_S = 1.0
_SHORTFALL_SHARE = 0.05


class DecodeError(Exception):
    """A video that cannot be decoded: a stable `error_type`, and what was found and expected."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message


@dataclass(frozen=True)
class VideoIndex:
    """When the frames of a video are shown, in ticks of its time base."""

    starts: NDArray[np.int64]  # [frames], ascending
    keys: NDArray[np.int64]  # starts of the frames that decoding may begin with, ascending
    tick_s: float
    duration_s: float  # from the first frame's start to the last one's end

    @property
    def origin_s(self) -> float:
        """Return the file's own time of the first frame."""
        return float(self.starts[0]) * self.tick_s

    def frames_at(self, times_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the number of the frame on display at each time from the first frame's start.

        That is the last frame that starts no later; times past the end mean the last frame.
        """
        starts_s = (self.starts - self.starts[0]) * self.tick_s
        microsecond = 1e-6  # a frame that starts at t is on display at t, whatever the rounding
        numbers = np.searchsorted(starts_s, times_s + microsecond, side="right") - 1
        return np.clip(numbers, 0, len(self.starts) - 1)


def open_media(path: Path, accel: HWAccel | None = None) -> InputContainer:
    """Open a media file. Raises DecodeError not_a_video, saying what the file looks like."""
    try:
        return av.open(str(path), options=dict(_OPTIONS), metadata_errors="ignore", hwaccel=accel)
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError(
            "not_a_video",
            f"expected a video file, found {describe_content(path)} "
            f"(FFmpeg: {getattr(error, 'strerror', error)}); replace or remove the file",
        ) from error


def describe_content(path: Path) -> str:
    """Say what a file that is no video looks like, from its size and first bytes."""
    size_bytes = path.stat().st_size
    if not size_bytes:
        return "an empty file"
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that was answered with an error page?)"
    if text.startswith((b"<?xml", b"{", b"#extm3u")):
        return f"text that begins with {head.lstrip()[:40]!r}"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide"):
        return "an MP4 file without a readable 'moov' table (an upload that was cut off?)"
    return f"{size_bytes} bytes that begin with {head[:16]!r}"


def video_stream(container: InputContainer) -> VideoStream:
    """Return the stream to read. Raises DecodeError no_video_stream: cover pictures are none."""
    pictures = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise DecodeError(
            "no_video_stream",
            f"expected a video stream, found {kinds} in this {container.format.long_name} file",
        )
    best = container.streams.best("video")
    return best if isinstance(best, VideoStream) and best in streams else streams[0]


def check_container(container: InputContainer, *, max_streams: int, max_duration_s: float) -> None:
    """Raise DecodeError too_many_streams, or too_long, by what the file says of itself."""
    if len(container.streams) > max_streams:
        raise DecodeError(
            "too_many_streams",
            f"{len(container.streams)} streams are more than the {max_streams} of "
            "decode.max_streams; raise it, or keep one video and one sound",
        )
    check_duration((container.duration or 0) / av.time_base, max_duration_s=max_duration_s)


def check_duration(duration_s: float, *, max_duration_s: float) -> None:
    """Raise DecodeError too_long."""
    if duration_s > max_duration_s:
        raise DecodeError(
            "too_long",
            f"{duration_s:.1f} s are more than the {max_duration_s:g} of decode.max_duration_s; "
            "cut the video, or raise it and run once with retry.failed=true",
        )


def check_size(stream: VideoStream, *, max_source_pixels: int) -> None:
    """Raise DecodeError too_large for frames that no limit would survive, or decode_error."""
    context = stream.codec_context
    if context is None:
        raise DecodeError("decode_error", "its video codec is unknown; transcode it, e.g. H.264")
    width, height = context.width, context.height
    if width * height > max_source_pixels:
        raise DecodeError(
            "too_large",
            f"frames of {width}x{height} are more than the {max_source_pixels} pixels of "
            "decode.max_source_pixels; raise it (and the memory limit) or scale the video down",
        )
    if width * height and max(width, height) > MAX_ASPECT * min(width, height):
        raise DecodeError(
            "too_large",
            f"frames of {width}x{height} are more than {MAX_ASPECT} times as long as wide, which "
            "the model does not take; crop the video",
        )


class _Packets:
    """What the packets of a file tell about its video stream, in ticks."""

    def __init__(self, stream_index: int) -> None:
        self._stream_index = stream_index
        self._timed = False  # whether packets say when they are shown
        self.starts: list[int] = []
        self.keys: list[int] = []
        self.first = sys.maxsize
        self.end = -sys.maxsize
        self.last_duration = 0
        self.others_end_s = 0.0

    def add(self, packet: "av.Packet[Any]") -> None:
        # Some containers know only when a frame is decoded; the second field of a frame that is
        # sent in two has no time of its own.
        start = packet.dts if packet.pts is None and not self._timed else packet.pts
        if start is None or not packet.size:
            return
        duration = packet.duration or 0
        if packet.stream_index != self._stream_index:
            end_s = (start + duration) * float(packet.time_base)
            self.others_end_s = max(self.others_end_s, end_s)
            return
        self._timed = self._timed or packet.pts is not None
        self.first = min(self.first, start)
        self.end = max(self.end, start + duration)
        self.last_duration = duration or self.last_duration
        if packet.is_keyframe:
            self.keys.append(start)
        if not packet.is_discard:
            self.starts.append(start)


def index_video(container: InputContainer, stream: VideoStream) -> VideoIndex:
    """Read the packets, not the pictures, of a video.

    Raises DecodeError truncated when they end clearly before the time the file states, and
    no_video_stream when there are none.
    """
    claimed_s = _stated_duration_s(stream)
    for other in container.streams:
        if other is not stream and claimed_s is not None:
            other.discard = Discard.all  # not needed, so not read
    packets = _Packets(stream.index)
    try:
        for packet in container.demux():
            packets.add(packet)
    except MemoryError:
        raise
    except ENDS:
        pass  # a file that breaks off; what is missing is judged below
    tick_s = float(stream.time_base or 1)
    found_s = max(0, packets.end - packets.first) * tick_s
    if claimed_s is None and container.duration:
        claimed_s = container.duration / av.time_base
        found_s = max(found_s, packets.others_end_s - (container.start_time or 0) / av.time_base)
    _check_complete(found_s, claimed_s)
    if not packets.starts:
        raise DecodeError("no_video_stream", "its video stream holds no frames; replace the file")
    shown = np.unique(np.array(packets.starts, dtype=np.int64))
    length_s = (max(packets.end, int(shown[-1])) - int(shown[0])) * tick_s
    if (
        not packets.last_duration
    ):  # the container keeps none: the last frame lasts as long as the others
        length_s += _usual_frame_s(shown, tick_s, stream)
    return VideoIndex(shown, np.unique(np.array(packets.keys, dtype=np.int64)), tick_s, length_s)


def _stated_duration_s(stream: VideoStream) -> float | None:
    """Return how long the video stream says it is, or None."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Matroska states it as a tag, from zero and not from the first frame.
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return None
    hours, minutes, seconds = (float(part) for part in tag.groups())
    start_s = float((stream.start_time or 0) * (stream.time_base or 1))
    return hours * 3600 + minutes * 60 + seconds - max(start_s, 0.0)


def _check_complete(found_s: float, claimed_s: float | None) -> None:
    missing_s = (claimed_s or 0.0) - found_s
    if claimed_s and missing_s > max(_LATEST_SHORTFALL_S, _SHORTFALL_SHARE * claimed_s):
        raise DecodeError(
            "truncated",
            f"the file states {claimed_s:.2f} s of video but holds {found_s:.2f} s; "
            "upload it again",
        )


def _usual_frame_s(shown: NDArray[np.int64], tick_s: float, stream: VideoStream) -> float:
    if len(shown) > 1:
        return float(np.median(np.diff(shown))) * tick_s
    return 1 / float(stream.average_rate or stream.base_rate or 25)
