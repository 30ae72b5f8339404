"""Decode one video file, and the child process that does so for `decoder_process`.

The child (`python -m pipeline.decoder ARGUMENTS`) reads one JSON object a line with the path of a
file, says that it has taken it, and answers with one line: either what it found, with the frames
and the sound in the shared file it was given, or an `error_type` and a `message`. It has no
credentials and sees no uri.
"""

import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import torch
from numpy.typing import NDArray

from omnisift.media import frame_size, resize_frames, sample_times
from pipeline.config import MediaConfig
from pipeline.media_frames import read_frames
from pipeline.media_index import (
    DecodeError,
    check_size,
    index_video,
    open_media,
    video_stream,
)
from pipeline.media_sound import read_sound

_MEBIBYTE = 1 << 20


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
    max_source_pixels: int
    memory_limit_bytes: int  # of address space, beyond what the start took
    shared_fd: int  # frames and sound come back through it


def decode_file(
    path: Path,
    media: MediaConfig,
    *,
    max_source_pixels: int,
    allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None,
) -> Decoded:
    """Sample frames by time and read the sound; `allocate` gives the array the frames go to.

    Raises DecodeError for whatever is wrong with the file.
    """
    with open_media(path) as container:
        stream = video_stream(container)
        check_size(stream, max_source_pixels=max_source_pixels)
        index = index_video(container, stream)
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
                if height * width > max_source_pixels:
                    check_size(stream, max_source_pixels=max_source_pixels)
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


def _decode_into(shared_fd: int, path: Path, media: MediaConfig, max_source_pixels: int) -> Any:
    """Decode into the shared file; return the line that describes it."""

    def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        size_bytes = int(np.prod(shape))
        os.ftruncate(shared_fd, size_bytes)
        return np.frombuffer(mmap(shared_fd, size_bytes), dtype=np.uint8).reshape(shape)

    decoded = decode_file(path, media, max_source_pixels=max_source_pixels, allocate=allocate)
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


def _answer(arguments: ChildArguments, media: MediaConfig, path: Path) -> Any:
    """Decode one file; say every fault of the file as an error_type."""
    try:
        return _decode_into(arguments.shared_fd, path, media, arguments.max_source_pixels)
    except DecodeError as error:
        return {"error_type": error.error_type, "message": error.message}
    except MemoryError:
        return _out_of_memory(arguments)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # torch has no class of its own for this
            return _out_of_memory(arguments)
        raise
    except av.FFmpegError as error:
        return {"error_type": "decode_error", "message": f"{error}; the file may be damaged"}


def _out_of_memory(arguments: ChildArguments) -> Any:
    limit = arguments.memory_limit_bytes // _MEBIBYTE
    return {
        "error_type": "out_of_memory",
        "message": f"decoding needs more than {limit} MiB; raise decode.memory_limit_bytes",
    }


def _limit_memory(limit_bytes: int) -> None:
    """Bound the address space to what is in use now and `limit_bytes` more; leave no core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    # The parent is gone, however it ended; a decoder in the middle of a file must not outlive it.
    os._exit(0)


def main() -> None:
    """Serve files until the parent closes the pipe."""
    arguments = ChildArguments(**json.loads(sys.argv[1]))
    # Libraries that print must not write between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    av.logging.set_level(av.logging.FATAL)
    torch.set_num_threads(1)
    media = MediaConfig(**arguments.media)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    resize_frames(torch.zeros((1, 8, 8, 3), dtype=torch.uint8), (28, 28))  # loads what is lazy
    _limit_memory(arguments.memory_limit_bytes)
    answers.write(json.dumps({"ready": True}) + "\n")
    while True:
        path = Path(json.loads(requests.get())["path"])
        answers.write(json.dumps({"taken": True}) + "\n")
        answers.write(json.dumps(_answer(arguments, media, path)) + "\n")


def child_arguments(
    media: MediaConfig, *, max_source_pixels: int, memory_limit_bytes: int, shared_fd: int
) -> str:
    """Return the ARGUMENTS of a child."""
    return json.dumps(
        asdict(ChildArguments(asdict(media), max_source_pixels, memory_limit_bytes, shared_fd))
    )


if __name__ == "__main__":
    main()
