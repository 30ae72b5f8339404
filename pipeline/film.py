"""A video file: its frames sampled by time and its sound, decoded window by window."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel
from numpy.typing import NDArray

from omnisift.media import frame_size, resize_frames, sample_times
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.media_frames import read_frames
from pipeline.media_index import (
    DecodeError,
    check_container,
    check_duration,
    check_size,
    index_video,
    open_media,
    video_stream,
)
from pipeline.media_nvdec import Nvdec
from pipeline.media_sound import SoundReader
from pipeline.media_windows import Window, cut


@dataclass(frozen=True)
class Decoded:
    """What the towers read of a video."""

    frames: NDArray[np.uint8]  # [T, H, W, 3], T even, H and W multiples of 28
    audio: NDArray[np.float32]  # [samples] at 16 kHz, empty without sound
    duration_s: float
    fps: float  # sampled frames a second
    has_audio: bool
    nvdec: bool | None  # whether NVDEC decoded the frames; None: decode.nvdec is false
    nvdec_failed: bool  # at frames that the CPU could decode


Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]


class Film:
    """A file that is within the limits, and what it shows when: it is decoded window by window."""

    def __init__(
        self,
        path: Path,
        media: MediaConfig,
        limits: DecodeConfig,
        *,
        nvdec: Nvdec | None = None,
        understood: Callable[[], None] | None = None,
    ) -> None:
        """Find out where each frame lies; nothing is decoded yet.

        With `nvdec` the frames that it takes are decoded by it. `understood` is called when the
        file is within the limits by what it says of itself, before all of it is read. Raises
        DecodeError for whatever is wrong with the file.
        """
        self._path, self._media, self._limits = path, media, limits
        with open_media(path) as container:
            check_container(
                container, max_streams=limits.max_streams, max_duration_s=limits.max_duration_s
            )
            stream = video_stream(container)
            check_size(stream, max_source_pixels=limits.max_source_pixels)
            if understood is not None:
                understood()
            self._index = index_video(container, stream)
            self._nvdec = nvdec if nvdec is not None and nvdec.takes(stream) else None
        check_duration(self._index.duration_s, max_duration_s=limits.max_duration_s)
        self.windows = cut(self._index.duration_s, media.window_s)

    @contextmanager
    def sound(self) -> Iterator[SoundReader]:
        """Open the sound, for all windows in their order."""
        with open_media(self._path) as container:
            yield SoundReader(container, origin_s=self._index.origin_s)

    def decode(
        self, window: Window, sound: SoundReader, allocate: Allocate | None = None
    ) -> Decoded:
        """Sample the frames of a window by time, and read its sound.

        `allocate` gives the array the frames go to. Raises DecodeError.
        """
        times_s, fps = sample_times(
            window.duration_s, fps=self._media.fps, max_frames=self._media.max_frames
        )
        frames, on_gpu = self._frames(window.start_s + times_s, allocate or _empty)
        longest_s = self._media.max_audio_s
        if not window.is_last:  # behind the pictures sound may go on
            longest_s = min(longest_s, window.duration_s)
        audio = sound.read(window.start_s, window.start_s + longest_s)
        return Decoded(
            frames=frames,
            audio=np.zeros(0, dtype=np.float32) if audio is None else audio,
            duration_s=window.duration_s,
            fps=fps,
            has_audio=audio is not None,
            nvdec=on_gpu if self._limits.nvdec else None,
            nvdec_failed=self._nvdec is not None and not on_gpu,
        )

    def _frames(
        self, times_s: NDArray[np.float64], allocate: Allocate
    ) -> tuple[NDArray[np.uint8], bool]:
        """Return the frames, and whether NVDEC decoded them; what it fails at, the CPU decodes."""
        if self._nvdec is not None:
            with contextlib.suppress(DecodeError, MemoryError, av.FFmpegError):
                return self._read(times_s, allocate, self._nvdec.accel), True
        return self._read(times_s, allocate), False

    def _read(
        self, times_s: NDArray[np.float64], allocate: Allocate, accel: HWAccel | None = None
    ) -> NDArray[np.uint8]:
        media, limits = self._media, self._limits
        numbers = self._index.frames_at(times_s)
        # A frame that is wanted twice is decoded once.
        distinct, places = np.unique(numbers, return_inverse=True)
        frames: NDArray[np.uint8] | None = None
        # Opened again: a demuxer that met its end may not seek back.
        with open_media(self._path, accel) as container:
            stream = video_stream(container)
            if media.reader == "decord":
                from pipeline.media_decord import read_frames_decord  # its FFmpeg where wanted

                pictures = read_frames_decord(self._path, distinct.tolist())
            else:
                pictures = read_frames(container, stream, self._index, distinct.tolist())
            for place, picture in enumerate(pictures):
                if frames is None:
                    height, width, _ = picture.shape
                    if height * width > limits.max_source_pixels:
                        check_size(stream, max_source_pixels=limits.max_source_pixels)
                    size = frame_size(
                        height, width, min_pixels=media.min_pixels, max_pixels=media.max_pixels
                    )
                    frames = allocate((len(times_s), *size, 3))
                # One by one: memory stays that of a single picture, whatever its size.
                resized = resize_frames(torch.from_numpy(picture)[None], size)[0]
                frames[places == place] = resized.numpy()
        assert frames is not None  # there is at least one number
        return frames


def decode_file(path: Path, media: MediaConfig, limits: DecodeConfig) -> Decoded:
    """Decode a file that is not cut. Raises DecodeError for whatever is wrong with it.

    Raises NvdecError where `limits` want NVDEC and there is none.
    """
    film = Film(path, media, limits, nvdec=Nvdec() if limits.nvdec else None)
    [window] = film.windows
    with film.sound() as sound:
        return film.decode(window, sound)


def _empty(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.empty(shape, dtype=np.uint8)
