"""Read chosen frames of a video, seeking over what is not wanted."""

from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from pipeline.media_index import ENDS, DecodeError, VideoIndex

_SEEK_FRAMES = 3  # decoding so few frames costs no more than a seek
_MAX_LAG_S = 1.0  # a frame that is this much older than the one wanted does not stand for it


class FrameReader:
    """Frames by number, in ascending order, decoding as little as the key frames allow.

    One frame is held besides the one returned, so memory does not grow with the video.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, index: VideoIndex) -> None:
        self._container = container
        self._stream = stream
        self._index = index
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "SLICE"
        self._shown: VideoFrame | None = None  # the newest frame at or before the last one wanted
        self._next: VideoFrame | None = None  # the one behind it, when decoding has got there
        self._position = int(index.starts[0])  # where decoding stands, in ticks
        self._skip_until = self._position  # pictures before it are wanted only as references
        # H.264 marks the pictures that no other is built on. HEVC's mark is not as strict.
        self._may_skip = stream.codec_context.name == "h264"
        self._frames = self._decode()

    def read(self, number: int) -> VideoFrame:
        """Return a frame; where it is damaged, one that is up to a second older.

        Raises DecodeError decode_error when there is none either.
        """
        wanted = int(self._index.starts[number])
        key = self._key_before(wanted)
        skipped = np.searchsorted(self._index.starts, (self._position, key))
        if key > self._position and skipped[1] - skipped[0] > _SEEK_FRAMES:
            self._frames = self._rewind(key)
        self._skip_until = wanted
        frame = self._forward(wanted)
        if _ticks(frame) != wanted:
            # The seek may have landed late, or its key frame may not have been a clean start.
            self._frames = self._rewind(self._key_before(key - 1))
            self._skip_until = self._position
            frame = self._forward(wanted) or frame
        lag_s = (wanted - _ticks(frame)) * self._index.tick_s
        if frame is None or lag_s > _MAX_LAG_S:
            second = (wanted - int(self._index.starts[0])) * self._index.tick_s
            raise DecodeError(
                "decode_error",
                f"the picture at {second:.2f} s cannot be decoded, nor any a second before; "
                "upload the file again",
            )
        return frame

    def _key_before(self, ticks: int) -> int:
        place = int(np.searchsorted(self._index.keys, ticks, side="right")) - 1
        return int(self._index.keys[place]) if place >= 0 else int(self._index.starts[0])

    def _rewind(self, key: int) -> Iterator[VideoFrame]:
        self._shown = self._next = None
        self._position = key
        try:
            self._container.seek(key, stream=self._stream, backward=True)
        except MemoryError:
            raise
        except av.FFmpegError:
            # A container that cannot seek by time is read from its first byte.
            self._container.seek(0, backward=True)
        return self._decode()

    def _decode(self) -> Iterator[VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.dts is not None and not packet.size:
                    continue  # an empty packet inside the stream would end the decoder
                if self._may_skip and packet.pts is not None:
                    skipped = packet.pts < self._skip_until
                    self._stream.codec_context.skip_frame = "NONREF" if skipped else "DEFAULT"
                try:
                    yield from packet.decode()
                except MemoryError:
                    raise
                except av.FFmpegError:
                    continue  # a damaged packet: the next good frame is judged by its time
        except MemoryError:
            raise
        except ENDS:
            return  # the file breaks off here

    def _forward(self, wanted: int) -> VideoFrame | None:
        """Decode until `wanted` is on display; None when the first frame is already later."""
        if self._next is not None:
            if _ticks(self._next) > wanted:
                return self._shown
            self._shown, self._next = self._next, None
        if _ticks(self._shown) == wanted:
            return self._shown
        for frame in self._frames:
            if frame.pts is None:
                continue
            self._position = frame.pts
            if frame.pts > wanted:
                self._next = frame
                break
            self._shown = frame
            if frame.pts == wanted:
                break
        return self._shown


def _ticks(frame: VideoFrame | None) -> float:
    """Return when a frame starts; before all time where there is none."""
    return -np.inf if frame is None or frame.pts is None else frame.pts


def read_frames(
    container: InputContainer, stream: VideoStream, index: VideoIndex, numbers: Sequence[int]
) -> Iterator[NDArray[np.uint8]]:
    """Yield upright RGB pictures, uint8 [H, W, 3], of the frames `numbers` (ascending)."""
    reader = FrameReader(container, stream, index)
    to_planes, to_rgb = VideoReformatter(), VideoReformatter()
    for number in numbers:
        frame = reader.read(number)
        if frame.format.name in ("cuda", "nv12"):
            # What a GPU decoded; its way to RGB rounds otherwise than that of the CPU's planes.
            frame = to_planes.reformat(frame, format="yuv420p")
        picture = to_rgb.reformat(frame, format="rgb24").to_ndarray().astype(np.uint8, copy=False)
        # The display matrix turns counterclockwise, as rot90 does.
        turns = round(frame.rotation / 90) % 4
        yield np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
