"""Decode one video file, and the child process that does so for `decoder_process`.

The child (`python -m pipeline.decoder ARGUMENTS`) reads one JSON object a line with the path of a
file, says that it has taken it, then that it understands it, and answers with one line: either what
it found, with the frames and the sound in the shared file it was given, or an `error_type` and a
`message`. It has no credentials, sees no uri, and works under limits of the system.
"""

import json
import math
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TextIO

import av
import av.logging
import numpy as np
import torch
from numpy.typing import NDArray

from omnisift.media import (
    FACTOR,
    MAX_ASPECT,
    SAMPLE_RATE,
    frame_size,
    resize_frames,
    sample_times,
)
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
from pipeline.media_sound import read_sound

_MEBIBYTE = 1 << 20
_MAX_OPEN_FILES = 64  # pipes, the video, and what libraries load late


@dataclass(frozen=True)
class Decoded:
    """What the towers read of a video."""

    frames: NDArray[np.uint8]  # [T, H, W, 3], T even, H and W multiples of 28
    audio: NDArray[np.float32]  # [samples] at 16 kHz, empty without sound
    duration_s: float
    fps: float  # sampled frames a second
    has_audio: bool


@dataclass(frozen=True)
class ChildArguments:
    """What a child is started with."""

    media: dict[str, Any]
    limits: dict[str, Any]
    shared_fd: int  # frames and sound come back through it


Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]


def decode_file(
    path: Path,
    media: MediaConfig,
    limits: DecodeConfig,
    *,
    allocate: Allocate | None = None,
    understood: Callable[[], None] | None = None,
) -> Decoded:
    """Sample frames by time and read the sound; `allocate` gives the array the frames go to.

    `understood` is called when the file is within the limits by what it says of itself: nothing has
    been decoded before. Raises DecodeError for whatever is wrong with the file.
    """
    with open_media(path) as container:
        check_container(
            container, max_streams=limits.max_streams, max_duration_s=limits.max_duration_s
        )
        stream = video_stream(container)
        check_size(stream, max_source_pixels=limits.max_source_pixels)
        if understood is not None:
            understood()
        index = index_video(container, stream)
    check_duration(index.duration_s, max_duration_s=limits.max_duration_s)
    times_s, fps = sample_times(index.duration_s, fps=media.fps, max_frames=media.max_frames)
    numbers = index.frames_at(times_s)
    # A frame that is wanted twice is decoded once.
    distinct, places = np.unique(numbers, return_inverse=True)
    frames: NDArray[np.uint8] | None = None
    with open_media(path) as container:  # again: a demuxer that met its end may not seek back
        stream = video_stream(container)
        if media.reader == "decord":
            from pipeline.media_decord import read_frames_decord  # its FFmpeg only where wanted

            pictures = read_frames_decord(path, distinct.tolist())
        else:
            pictures = read_frames(container, stream, index, distinct.tolist())
        for place, picture in enumerate(pictures):
            if frames is None:
                height, width, _ = picture.shape
                if height * width > limits.max_source_pixels:
                    check_size(stream, max_source_pixels=limits.max_source_pixels)
                size = frame_size(
                    height, width, min_pixels=media.min_pixels, max_pixels=media.max_pixels
                )
                frames = (allocate or _empty)((len(times_s), *size, 3))
            # One by one: memory stays that of a single picture, whatever its size.
            resized = resize_frames(torch.from_numpy(picture)[None], size)[0]
            frames[places == place] = resized.numpy()
    assert frames is not None  # there is at least one number
    with open_media(path) as container:
        audio = read_sound(container, origin_s=index.origin_s, max_s=media.max_audio_s)
    return Decoded(
        frames=frames,
        audio=np.zeros(0, dtype=np.float32) if audio is None else audio,
        duration_s=index.duration_s,
        fps=fps,
        has_audio=audio is not None,
    )


def _empty(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.empty(shape, dtype=np.uint8)


def _decode_into(work: "_Work", path: Path) -> Any:
    """Decode into the shared file; return the line that describes it."""
    shared_fd = work.shared_fd

    def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        size_bytes = int(np.prod(shape))
        os.ftruncate(shared_fd, size_bytes)
        return np.frombuffer(mmap(shared_fd, size_bytes), dtype=np.uint8).reshape(shape)

    decoded = decode_file(
        path,
        work.media,
        work.limits,
        allocate=allocate,
        understood=lambda: work.say({"understood": True}),
    )
    frames_bytes = decoded.frames.nbytes
    os.ftruncate(shared_fd, frames_bytes + decoded.audio.nbytes)
    written = 0
    samples = decoded.audio.data.cast("B")
    while written < samples.nbytes:
        written += os.pwrite(shared_fd, samples[written:], frames_bytes + written)
    return {
        "frames_shape": list(decoded.frames.shape),
        "audio_bytes": decoded.audio.nbytes,
        "duration_s": decoded.duration_s,
        "fps": decoded.fps,
        "has_audio": decoded.has_audio,
    }


def _answer(work: "_Work", path: Path) -> Any:
    """Decode one file; say every fault of the file as an error_type."""
    try:
        return _decode_into(work, path)
    except DecodeError as error:
        return {"error_type": error.error_type, "message": error.message}
    except MemoryError:
        return _out_of_memory(work.limits)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # torch has no class of its own for this
            return _out_of_memory(work.limits)
        raise
    except av.FFmpegError as error:
        return {"error_type": "decode_error", "message": f"{error}; the file may be damaged"}


def _out_of_memory(limits: DecodeConfig) -> Any:
    limit = limits.memory_limit_bytes // _MEBIBYTE
    return {
        "error_type": "out_of_memory",
        "message": f"decoding needs more than {limit} MiB; raise decode.memory_limit_bytes",
    }


def largest_answer_bytes(media: MediaConfig) -> int:
    """Return what frames and sound may take at most: the longest strips round up the most."""
    side = math.ceil(math.sqrt(MAX_ASPECT * media.max_pixels))
    pixels = media.max_pixels + 2 * FACTOR * side + FACTOR**2
    return media.max_frames * pixels * 3 + math.ceil(media.max_audio_s * SAMPLE_RATE) * 4


def _limit_resources(media: MediaConfig, limits: DecodeConfig) -> None:
    """Bound memory, files and what is written to them; leave no core file.

    Of address space there is what is in use now and `memory_limit_bytes` more.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + limits.memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    written = largest_answer_bytes(media) + _MEBIBYTE  # the rest is for what libraries print
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))


def _limit_cpu(limits: DecodeConfig) -> None:
    """Give the next file as many seconds of CPU as of time: a child works on its own."""
    until_s = math.ceil(time.process_time() + limits.deadline_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until_s, resource.RLIM_INFINITY))


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    # The parent is gone, however it ended; a decoder in the middle of a file must not outlive it.
    os._exit(0)


@dataclass(frozen=True)
class _Work:
    """What a child decodes with, and how it answers."""

    media: MediaConfig
    limits: DecodeConfig
    shared_fd: int
    answers: TextIO

    def say(self, line: Any) -> None:
        self.answers.write(json.dumps(line) + "\n")


def main() -> None:
    """Serve files until the parent closes the pipe."""
    arguments = ChildArguments(**json.loads(sys.argv[1]))
    # Libraries that print must not write between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    av.logging.set_level(av.logging.FATAL)
    torch.set_num_threads(1)
    media, limits = MediaConfig(**arguments.media), DecodeConfig(**arguments.limits)
    work = _Work(media, limits, arguments.shared_fd, answers)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    resize_frames(torch.zeros((1, 8, 8, 3), dtype=torch.uint8), (28, 28))  # loads what is lazy
    _limit_resources(media, limits)
    work.say({"ready": True})
    while True:
        path = Path(json.loads(requests.get())["path"])
        _limit_cpu(limits)
        work.say({"taken": True})
        work.say(_answer(work, path))


def child_arguments(media: MediaConfig, limits: DecodeConfig, *, shared_fd: int) -> str:
    """Return the ARGUMENTS of a child."""
    return json.dumps(asdict(ChildArguments(asdict(media), asdict(limits), shared_fd)))


if __name__ == "__main__":
    main()
