"""The child process that decodes video files for `decoder_process`.

It (`python -m pipeline.decoder ARGUMENTS`) reads one JSON object a line with the path of a
file, says that it has taken it, then that it understands it, then where it cuts it, and answers
with one line for each window: either what it found, with the frames and the sound in the shared
file it was given, or an `error_type` and a `message`. Between two windows it waits for a line,
since they share the file. It has no credentials, sees no uri, and works under limits of the system.
"""

import json
import math
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, TextIO

import av
import av.logging
import numpy as np
import torch
from numpy.typing import NDArray

from omnisift.media import FACTOR, MAX_ASPECT, SAMPLE_RATE, resize_frames
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.film import Film
from pipeline.media_index import DecodeError
from pipeline.media_nvdec import Nvdec, NvdecError
from pipeline.media_sound import SoundReader
from pipeline.media_windows import Window

_MEBIBYTE = 1 << 20
_MAX_OPEN_FILES = 128  # pipes, the video, a GPU's, and what libraries load late


@dataclass(frozen=True)
class ChildArguments:
    """What a child is started with."""

    media: dict[str, Any]
    limits: dict[str, Any]
    shared_fd: int  # frames and sound come back through it


def _serve(work: "_Work", path: Path, skip: Container[int]) -> None:
    """Decode a file into the shared file, window by window; say every fault as an error_type."""
    try:
        understood = partial(work.say, {"understood": True})
        film = Film(path, work.media, work.limits, nvdec=work.nvdec, understood=understood)
        left = film.windows
        if len(left) > 1:
            work.say({"cut_s": left[-1].end_s})
            left = [window for window in left if window.number not in skip]
        found = None
        with film.sound() as sound:
            for window in left:
                if found is not None:
                    work.say(found)
                    if not work.go_on():
                        return
                    _limit_cpu(work.limits)
                found = _guarded(partial(_decode_into, work, film, window, sound), work.limits)
        if found is not None:  # last, when no file is open any more
            work.say(found)
    except _FAULTS as error:
        work.say({**_fault(error, work.limits), "ended": True})


def _decode_into(work: "_Work", film: Film, window: Window, sound: SoundReader) -> Any:
    """Decode a window into the shared file; return the line that describes it."""
    shared_fd = work.shared_fd

    def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        size_bytes = int(np.prod(shape))
        os.ftruncate(shared_fd, size_bytes)
        return np.frombuffer(mmap(shared_fd, size_bytes), dtype=np.uint8).reshape(shape)

    decoded = film.decode(window, sound, allocate)
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
        "nvdec": decoded.nvdec,
        "nvdec_failed": decoded.nvdec_failed,
    }


_FAULTS = (DecodeError, MemoryError, RuntimeError, av.FFmpegError)


def _guarded(decode: Callable[[], Any], limits: DecodeConfig) -> Any:
    try:
        return decode()
    except _FAULTS as error:
        return _fault(error, limits)


def _fault(error: Exception, limits: DecodeConfig) -> Any:
    """Say a fault of the file, or raise what is none."""
    if isinstance(error, DecodeError):
        return {"error_type": error.error_type, "message": error.message}
    # torch has no class of its own for memory
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return _out_of_memory(limits)
    if isinstance(error, av.FFmpegError):
        return {"error_type": "decode_error", "message": f"{error}; the file may be damaged"}
    raise error


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
    nvdec: Nvdec | None
    shared_fd: int
    answers: TextIO
    requests: "queue.SimpleQueue[str]"

    def say(self, line: Any) -> None:
        self.answers.write(json.dumps(line) + "\n")

    def go_on(self) -> bool:
        """Wait for a line; False when it is about another file: nobody wants this one any more."""
        line = self.requests.get()
        if "path" not in json.loads(line):
            return True
        self.requests.put(line)
        return False


def main() -> None:
    """Serve files until the parent closes the pipe."""
    arguments = ChildArguments(**json.loads(sys.argv[1]))
    # Libraries that print must not write between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    av.logging.set_level(av.logging.FATAL)
    torch.set_num_threads(1)
    media, limits = MediaConfig(**arguments.media), DecodeConfig(**arguments.limits)
    nvdec, why_not = None, None
    if limits.nvdec:
        try:
            nvdec = Nvdec()  # before the limits: its address space is not the file's
        except NvdecError as error:
            why_not = str(error)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    work = _Work(media, limits, nvdec, arguments.shared_fd, answers, requests)
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    resize_frames(torch.zeros((1, 8, 8, 3), dtype=torch.uint8), (28, 28))  # loads what is lazy
    _limit_resources(media, limits)
    work.say({"no_nvdec": why_not})
    while True:
        request = json.loads(requests.get())
        if "path" in request:  # else it asks for more of a file that was given up
            _limit_cpu(limits)
            work.say({"taken": True})
            _serve(work, Path(request["path"]), frozenset(request["skip"]))


def child_arguments(media: MediaConfig, limits: DecodeConfig, *, shared_fd: int) -> str:
    """Return the ARGUMENTS of a child."""
    return json.dumps(asdict(ChildArguments(asdict(media), asdict(limits), shared_fd)))


if __name__ == "__main__":
    main()
