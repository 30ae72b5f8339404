"""Decode: a video's uri becomes sampled frames and sound."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import rows
from pipeline.boundary import BoundaryError, Roots
from pipeline.config import DecodeConfig, MediaConfig, StorageConfig
from pipeline.decoder_process import DecodedBytes, DecoderProcess
from pipeline.keys import window_key
from pipeline.media_index import DecodeError
from pipeline.media_windows import Window
from pipeline.storage import S3, ObjectInfo, Storage, StorageError

_LOG = logging.getLogger(__name__)
_PREFIX = "video-decode-"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Decode:
    """Fetch each video and sample it in a guarded child process; a bad video costs one row.

    Reads: uri, size_bytes, etag, skip_windows. Writes: frames, frames_shape, audio, duration_s,
    fps, has_audio, decode_s, nvdec; of a window also video_key, start_s, windows. The windows of a
    long video go on one by one, so that it takes no more memory than one of them.
    """

    def __init__(
        self, media: MediaConfig, decode: DecodeConfig, storage: StorageConfig, roots: Roots
    ) -> None:
        self._limits = decode
        self._roots = roots
        self._storage = Storage(storage)
        self._temp_dir, lock_fd = _own_temp_dir(Path(decode.temp_dir or tempfile.gettempdir()))
        self._decoder = DecoderProcess(media, decode)
        self._decoder.start()  # now, while the actors behind load their models
        # Runs at exit as well; when the process is killed, the next actor here sweeps.
        self._finalizer = weakref.finalize(self, _give_back, self._decoder, self._temp_dir, lock_fd)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Decode the rows of a block, from rows.IDENTITY to rows.DECODED, one at a time."""
        for row in rows.iterate(block):
            for decoded in self.decode(row):
                yield rows.build([decoded], rows.DECODED)

    def close(self) -> None:
        """End the child process and remove the temporary files."""
        self._finalizer()

    def decode(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a row of rows.DECODED for a row of rows.IDENTITY; for each window, where it is cut.

        A window's row has a key of its own. What fails before it is known where to cut fails all.
        """
        if row["error_type"] is not None:
            yield row
            return
        start = time.monotonic()
        uri = row["uri"]
        try:
            for window, found in self._decode(row):
                part = {**row, **_columns(row, window), "decode_s": time.monotonic() - start}
                if isinstance(found, DecodeError):
                    span = f", {window.start_s:g} to {window.end_s:g} s" if window else ""
                    message = f"{uri}{span}: {found.message}"
                    yield _logged(rows.failed(part, "decode", found.error_type, message))
                else:
                    if found.nvdec_failed:
                        _LOG.warning("%s: NVDEC failed, so the CPU decoded it", uri)
                    yield {**part, **vars(found)}
                start = time.monotonic()
        except (BoundaryError, StorageError) as error:
            failed = rows.failed(row, "decode", error.error_type, str(error))
        except DecodeError as error:
            failed = rows.failed(row, "decode", error.error_type, f"{uri}: {error.message}")
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            message = (
                f"{uri}: {row['size_bytes']:,} bytes do not fit in {self._temp_dir.parent} "
                f"({error.strerror}); make room there or set decode.temp_dir"
            )
            failed = rows.failed(row, "decode", "disk_full", message)
        else:
            return
        yield _logged({**failed, "decode_s": time.monotonic() - start})

    def _decode(
        self, row: dict[str, Any]
    ) -> Iterator[tuple[Window | None, DecodedBytes | DecodeError]]:
        size_bytes: int = row["size_bytes"]
        if size_bytes > self._limits.max_size_bytes:
            raise DecodeError(
                "too_large",
                f"{size_bytes} bytes are more than the {self._limits.max_size_bytes} of "
                "decode.max_size_bytes; raise it or transcode the video",
            )
        with self._file(ObjectInfo(row["uri"], size_bytes, row["etag"] or "", 0)) as path:
            yield from self._decoder.decode_windows(path, row["skip_windows"] or ())

    @contextlib.contextmanager
    def _file(self, info: ObjectInfo) -> Iterator[Path]:
        """Give the video as a file: a local one as it lies there, any other as a copy."""
        if not info.uri.startswith(S3):
            path = self._roots.resolve(info.uri)  # again: a link may have been put there since
            found = self._storage.stat(info.uri)
            if found.size_bytes != info.size_bytes:
                raise StorageError(
                    "changed",
                    f"{info.uri}: {info.size_bytes} bytes were listed, {found.size_bytes} are "
                    "there now; run the job again",
                )
            yield path
            return
        self._roots.check(info.uri)  # a line by key passed no check before
        # Its ending is a hint to the demuxer, and all that is taken from the name.
        ending = re.search(r"\.[A-Za-z0-9]{1,5}$", info.uri)
        path = self._temp_dir / f"video{ending.group() if ending else ''}"
        try:
            self._storage.download(info, path)
            yield path
        finally:
            path.unlink(missing_ok=True)


def _columns(row: dict[str, Any], window: Window | None) -> dict[str, Any]:
    """Return what names the row of a window; nothing for a whole video."""
    if window is None:
        return {}
    skipped = {number for number in row["skip_windows"] or () if number < window.count}
    return {
        "video_key": window_key(
            row["video_key"], row["window_s"], window.number, last=window.is_last
        ),
        "start_s": window.start_s,
        "duration_s": window.duration_s,
        "windows": window.count - len(skipped),
    }


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    _LOG.warning("decode %s in %.1f s: %s", row["error_type"], row["decode_s"], row["uri"])
    return row


def _give_back(decoder: DecoderProcess, temp_dir: Path, lock_fd: int) -> None:
    decoder.close()
    shutil.rmtree(temp_dir, ignore_errors=True)
    os.close(lock_fd)


def _own_temp_dir(parent: Path) -> tuple[Path, int]:
    """Make a folder for this actor, and remove those whose actors were killed.

    A living actor holds a lock on its folder, by the descriptor that is returned; the system lets
    go of it when the process ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, of another user, or swept by another actor
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():  # not swept between its making and its locking
            return folder, descriptor
        os.close(descriptor)
