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


class SoundReader:
    """The sound of a file, span after span, mono at 16 kHz.

    Where sound starts later, or pauses, there are zeros. A span holds the samples that it would
    hold if all of the file were read at once, wherever the file is cut.
    """

    def __init__(self, container: InputContainer, *, origin_s: float) -> None:
        """Take a container that nothing else is read from; `origin_s` is second 0 of the spans."""
        self._origin_s = origin_s
        self._track = _Track()
        self._frames: Iterator[AudioFrame] = iter(())
        stream = container.streams.best("audio")
        if isinstance(stream, AudioStream) and stream.codec_context is not None:
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all  # not needed, so not read
            self._frames = _decode(container, stream)

    def read(self, start_s: float, end_s: float) -> NDArray[np.float32] | None:
        """Return the sound of a span, float32 [samples], up to its last sample.

        Spans are read in order; they may leave gaps. None where there is none: no stream, or no
        sample in the span.
        """
        start, end = round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
        while self._track.cursor < end:
            frame = next(self._frames, None)
            if frame is None:
                self._track.flush()
                break
            if frame.samples:
                self._track.add(frame, self._origin_s)
                self._track.forget(start)
        return self._track.take(start, end)


class _Track:
    """Sound put where its stamps say, resampled run by run: a run is sound without a gap."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, NDArray[np.float32]]] = []  # resampled, by first sample
        self.cursor = 0  # where the next resampled sample goes; negative before the origin
        self._end_s = -np.inf  # where the last frame ended
        self._kind: tuple[str, str, int] | None = None  # what the resampler was made for
        self._resampler: AudioResampler | None = None

    def add(self, frame: AudioFrame, origin_s: float) -> None:
        """Place a frame."""
        start_s = self._end_s if frame.time is None else frame.time - origin_s
        if not np.isfinite(start_s):
            start_s = 0.0
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind or abs(start_s - self._end_s) > _JITTER_S:
            self.flush()
            self._kind = kind
            # Packed: of planar sound PyAV finds eight channels, and reads anywhere for more.
            self._resampler = AudioResampler("flt", frame.layout, SAMPLE_RATE)
            self.cursor = round(start_s * SAMPLE_RATE)
            self._end_s = start_s
        self._end_s += frame.samples / frame.sample_rate
        frame.pts = None  # the stamps are accounted for here
        self._put(frame)

    def flush(self) -> None:
        """Take out what the resampler still holds: no frame follows what it was given."""
        if self._resampler is not None:
            self._put(None)
            self._resampler = self._kind = None

    def forget(self, start: int) -> None:
        """Drop the pieces that end before a sample."""
        while self._pieces and self._pieces[0][0] + len(self._pieces[0][1]) <= start:
            self._pieces.pop(0)

    def take(self, start: int, end: int) -> NDArray[np.float32] | None:
        """Return the samples of a span up to the last there is; None without any."""
        samples = np.zeros(max(0, end - start), dtype=np.float32)
        filled = 0
        for place, piece in self._pieces:
            first, last = max(place, start), min(place + len(piece), end)
            if last > first:
                samples[first - start : last - start] = piece[first - place : last - place]
                filled = max(filled, last - start)
        self._pieces = [each for each in self._pieces if each[0] + len(each[1]) > end]
        return samples[:filled].copy() if filled else None

    def _put(self, frame: AudioFrame | None) -> None:
        assert self._resampler is not None
        for piece in self._resampler.resample(frame):
            # The mean of the channels, as the published loader has it. FFmpeg's own way to mono
            # is louder: it adds them with weights whose sum is above one.
            channels = piece.to_ndarray().reshape(-1, piece.layout.nb_channels).T
            samples = np.ascontiguousarray(channels).mean(axis=0)
            self._pieces.append((self.cursor, samples))
            self.cursor += len(samples)


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
