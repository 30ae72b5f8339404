"""Keep a child process that decodes; when it hangs, crashes or swells, one video has failed."""

import contextlib
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config import DecodeConfig, MediaConfig
from pipeline.decoder import child_arguments
from pipeline.media_index import DecodeError
from pipeline.media_windows import Window, cut

_LOG = logging.getLogger(__name__)

_START_S = 300.0  # importing torch from a cold network disk
_TAKE_S = 60.0  # an idle child takes a file at once, or it is stuck
_STDERR_BYTES = 400
_LINE_BYTES = 1 << 20  # an answer is a few hundred bytes
# All that a child gets of the environment: it works on files from strangers, so no credentials.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "HF_HOME")
_GPU_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY")


@dataclass(frozen=True)
class DecodedBytes:
    """A decoded video as the rows carry it; see `film.Decoded` for shapes and units."""

    frames: bytes
    frames_shape: list[int]
    audio: bytes
    duration_s: float
    fps: float
    has_audio: bool
    nvdec: bool | None
    nvdec_failed: bool


class DecoderProcess:
    """A long-lived child, started when first needed and again after it was lost.

    Frames come back through an anonymous file in memory that parent and child share: it has no
    name, so nothing is left behind however either of them ends.
    """

    def __init__(self, media: MediaConfig, limits: DecodeConfig) -> None:
        self._media = media
        self._limits = limits
        self._shared_fd = os.memfd_create("decoded")
        self._stderr = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - lives as long as the child
        self._child: subprocess.Popen[bytes] | None = None
        self._heard = b""  # of an answer that is not yet complete
        self._finalizer = weakref.finalize(self, os.close, self._shared_fd)

    @property
    def pid(self) -> int | None:
        """Return the id of the child, or None when there is none."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Start the child, if there is none, and wait until it can decode."""
        if self._child is not None and self._child.poll() is None:
            return
        self.stop()
        arguments = child_arguments(self._media, self._limits, shared_fd=self._shared_fd)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.decoder", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,  # a file takes any amount of chatter; a pipe would fill and block
            env=_child_environment(),
            pass_fds=(self._shared_fd,),
        )
        ready = self._hear(time.monotonic() + _START_S)
        if ready is None:
            status = self._end_of_child()
            raise RuntimeError(f"the decoding process did not start: {status}: {self._chatter()}")
        if ready["no_nvdec"]:
            _LOG.warning("decode.nvdec=true, but the CPU decodes here: %s", ready["no_nvdec"])

    def stop(self) -> None:
        """End the child, if there is one, and forget what it said."""
        if self._child is not None:
            self._end_of_child()
        self._heard = b""
        os.ftruncate(self._shared_fd, 0)

    def close(self) -> None:
        """End the child and give everything back; the object is of no use afterwards."""
        if self._finalizer.alive:
            self.stop()
            self._stderr.close()
            self._finalizer()

    def decode(self, path: Path) -> DecodedBytes:
        """Decode a file that is not cut. Raises DecodeError; the next file is unharmed."""
        [(_, found)] = self.decode_windows(path)
        if isinstance(found, DecodeError):
            raise found
        return found

    def decode_windows(
        self, path: Path, skip: Sequence[int] = ()
    ) -> Iterator[tuple[Window | None, DecodedBytes | DecodeError]]:
        """Decode a file window by window, but for those of `skip`; None stands for all of it.

        A window that cannot be decoded is a fault of its own. Behind one that hangs, crashes or
        swells the child the others are not tried: they have the same fault.
        """
        self.start()
        request = {"path": str(path), "skip": list(skip)}
        if not self._offer(request):  # lost while idle, which is not the fault of this file
            self.stop()
            self.start()
            self._offer(request)
        left: list[Window | None] = [None]
        nvdec_failed = False
        try:
            answer = self._await("probe_timeout", self._limits.probe_s, "decode.probe_s")
            if "understood" in answer:
                answer = self._await_decoded()
            if "cut_s" in answer:
                # A child that was led astray could say anything: at most what is let in.
                duration_s = min(answer["cut_s"], self._limits.max_duration_s)
                windows = cut(duration_s, self._media.window_s)
                left = [window for window in windows if window.number not in skip]
                answer = self._await_decoded() if left else {}
            while left:
                found, goes_on = self._found(answer)
                nvdec_failed |= not isinstance(found, DecodeError) and found.nvdec_failed
                yield left.pop(0), found
                if left and goes_on:
                    self._send({"next": True})
                    answer = self._await_decoded()
                elif left:
                    assert isinstance(found, DecodeError)
                    raise found
        except DecodeError as error:
            yield from ((window, error) for window in left)
        if nvdec_failed:
            self.stop()  # see media_nvdec.Nvdec

    def _found(self, answer: dict[str, Any]) -> tuple[DecodedBytes | DecodeError, bool]:
        """Return what the child says of a window, and whether it waits to go on."""
        if "error_type" not in answer:
            return self._collect(answer), True
        swollen = answer["error_type"] == "out_of_memory"
        if swollen:
            self.stop()  # what it holds on to would be missing for the next file
        error = DecodeError(answer["error_type"], answer["message"])
        return error, not swollen and "ended" not in answer

    def _await_decoded(self) -> dict[str, Any]:
        return self._await("decode_timeout", self._limits.deadline_s, "decode.deadline_s")

    def _await(self, error_type: str, limit_s: float, key: str) -> dict[str, Any]:
        """Return the next line on a file; a child that gives none in time is no more."""
        deadline = time.monotonic() + limit_s
        answer = self._hear(deadline)
        if answer is not None:
            return answer
        late = time.monotonic() >= deadline
        status = self._end_of_child()
        chatter = self._chatter()
        self.stop()
        if late or status == f"signal {signal.SIGXCPU.name}":
            raise DecodeError(
                error_type,
                f"not {'understood' if error_type == 'probe_timeout' else 'decoded'} within "
                f"{limit_s:g} s; if the video is sound, raise {key}",
            )
        raise DecodeError(
            "decode_crash",
            f"the decoder died ({status}) on this file: {chatter}; it is likely damaged, "
            "transcode it or remove it",
        )

    def _collect(self, answer: dict[str, Any]) -> DecodedBytes:
        shape = answer["frames_shape"]
        frames_bytes = math.prod(shape)
        frames = _read(self._shared_fd, 0, frames_bytes)
        audio = _read(self._shared_fd, frames_bytes, answer["audio_bytes"])
        os.ftruncate(self._shared_fd, 0)  # gives the memory back
        return DecodedBytes(
            frames=frames,
            frames_shape=shape,
            audio=audio,
            duration_s=answer["duration_s"],
            fps=answer["fps"],
            has_audio=answer["has_audio"],
            nvdec=answer["nvdec"],
            nvdec_failed=answer["nvdec_failed"],
        )

    def _offer(self, request: dict[str, Any]) -> bool:
        """Hand a file to the child; False when it is not there to take it."""
        self._stderr.truncate(0)
        try:
            self._send(request)
        except BrokenPipeError:
            return False
        return self._hear(time.monotonic() + _TAKE_S) is not None

    def _send(self, line: dict[str, Any]) -> None:
        assert self._child is not None
        _pipe(self._child.stdin).write(json.dumps(line).encode() + b"\n")
        _pipe(self._child.stdin).flush()

    def _hear(self, deadline: float) -> dict[str, Any] | None:
        """Return the next line, or None when the deadline passes or the child ends.

        A child that says anything else has been led astray by its file, and counts as dead too.
        """
        assert self._child is not None
        descriptor = _pipe(self._child.stdout).fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while b"\n" not in self._heard:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                return None
            piece = os.read(descriptor, 1 << 16)
            if not piece or len(self._heard) > _LINE_BYTES:
                return None
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return _parsed(line)

    def _end_of_child(self) -> str:
        """Make sure that the child is gone, and say how it ended."""
        assert self._child is not None
        child, self._child = self._child, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)  # one that died by itself tells more than one that is killed
        child.kill()
        code = child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):
                _pipe(pipe).close()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _chatter(self) -> str:
        """Return the end of what the child printed."""
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - _STDERR_BYTES))
        return self._stderr.read().decode(errors="replace").strip() or "it printed nothing"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # both were asked for
    return pipe


def _read(descriptor: int, offset: int, size_bytes: int) -> bytes:
    parts = []
    while size_bytes:
        part = os.pread(descriptor, size_bytes, offset)
        if not part:
            raise RuntimeError(f"the decoding process gave {size_bytes} bytes fewer than it said")
        parts.append(part)
        offset += len(part)
        size_bytes -= len(part)
    return b"".join(parts)


def _child_environment() -> dict[str, str]:
    names = (*_ENVIRONMENT, *_GPU_ENVIRONMENT)
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["OMP_NUM_THREADS"] = "1"
    return environment
