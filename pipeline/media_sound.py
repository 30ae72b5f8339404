"""Read the sound of a media file as the audio tower takes it."""

from collections.abc import Iterator

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Discard
from numpy.typing import NDArray

from omnisift.media import SAMPLE_RATE
from pipeline.media_index import ENDS

_JITTER_S = 0.1  # stamps of sound wander by less than this; more is a gap


def read_sound(
    container: InputContainer, *, origin_s: float, max_s: float
) -> NDArray[np.float32] | None:
    """Return mono sound at 16 kHz, float32 [samples], beginning at `origin_s` of the file's time.

    Where sound starts later, or pauses, there are zeros; what is earlier, or later than `max_s`
    seconds, is left out. None where there is no sound: no stream, or one without samples.
    """
    stream = container.streams.best("audio")
    if not isinstance(stream, AudioStream) or stream.codec_context is None:
        return None
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all  # not needed, so not read
    max_samples = round(max_s * SAMPLE_RATE)
    sound = _Track(max_samples)
    for frame in _decode(container, stream):
        if frame.samples and not sound.add(frame, origin_s):
            break
    return sound.finish()


class _Track:
    """Sound put where its stamps say, resampled run by run: a run is sound without a gap."""

    def __init__(self, max_samples: int) -> None:
        self._samples = np.zeros(max_samples, dtype=np.float32)
        self._filled = 0  # samples from the origin that are settled
        self._cursor = 0  # where the next resampled sample goes; negative before the origin
        self._end_s = -np.inf  # where the last frame ended
        self._kind: tuple[str, str, int] | None = None  # what the resampler was made for
        self._resampler: AudioResampler | None = None

    def add(self, frame: AudioFrame, origin_s: float) -> bool:
        """Place a frame; False when everything up to the limit is filled."""
        start_s = self._end_s if frame.time is None else frame.time - origin_s
        if not np.isfinite(start_s):
            start_s = 0.0
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind or abs(start_s - self._end_s) > _JITTER_S:
            self._flush()
            self._kind = kind
            # Packed: of planar sound PyAV finds eight channels, and reads anywhere for more.
            self._resampler = AudioResampler("flt", frame.layout, SAMPLE_RATE)
            self._cursor = round(start_s * SAMPLE_RATE)
            self._end_s = start_s
        self._end_s += frame.samples / frame.sample_rate
        frame.pts = None  # the stamps are accounted for here
        self._put(frame)
        return self._cursor < len(self._samples)

    def finish(self) -> NDArray[np.float32] | None:
        """Return the sound up to its last sample, or None when there never was any."""
        self._flush()
        return self._samples[: self._filled].copy() if self._filled else None

    def _flush(self) -> None:
        if self._resampler is not None:
            self._put(None)

    def _put(self, frame: AudioFrame | None) -> None:
        assert self._resampler is not None
        for piece in self._resampler.resample(frame):
            # The mean of the channels, as the published loader has it. FFmpeg's own way to mono
            # is louder: it adds them with weights whose sum is above one.
            channels = piece.to_ndarray().reshape(-1, piece.layout.nb_channels).T
            samples = np.ascontiguousarray(channels).mean(axis=0)
            start, stop = self._cursor, min(self._cursor + len(samples), len(self._samples))
            if stop > max(start, 0):
                self._samples[max(start, 0) : stop] = samples[max(start, 0) - start : stop - start]
                self._filled = max(self._filled, stop)
            self._cursor += len(samples)


def _decode(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Yield the frames that can be decoded; damage leaves a gap."""
    try:
        for packet in container.demux(stream):
            if packet.dts is not None and not packet.size:
                continue
            try:
                yield from packet.decode()
            except MemoryError:
                raise
            except av.FFmpegError:
                continue
    except MemoryError:
        raise
    except ENDS:
        return
