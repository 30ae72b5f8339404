"""Read, list and write files of this machine for `Storage`, atomically and durably."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import pyarrow as pa

from pipeline.storage_errors import ObjectInfo, StorageError, forbidden

_T = TypeVar("_T")

_FILE = "file://"
_UNFINISHED = ".unfinished-"  # prefix of files that are being written


def _path(uri: str) -> Path:
    return Path(uri.removeprefix(_FILE))


def _guard(uri: str, call: Callable[[], _T]) -> _T:
    """Run a file operation; say its failure as a StorageError."""
    try:
        return call()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError("not_found", f"{uri}: does not exist; check the path") from error
    except PermissionError as error:
        raise forbidden(uri, error.strerror or "permission denied") from error
    except OSError as error:
        raise StorageError("storage_error", f"{uri}: {error.strerror}; check the disk") from error


def _info(uri: str) -> ObjectInfo:
    path = _path(uri)
    if path.is_dir():
        raise FileNotFoundError(uri)
    stat = path.stat()
    return ObjectInfo(uri, stat.st_size, "", stat.st_mtime_ns)


def stat(uri: str) -> ObjectInfo:
    """Return size and time of a file."""
    return _guard(uri, lambda: _info(uri))


def read(uri: str) -> bytes:
    """Return a whole file."""
    return _guard(uri, lambda: _path(uri).read_bytes())


def open_file(uri: str) -> BinaryIO:
    """Open a file for reading."""
    return _guard(uri, lambda: _path(uri).open("rb"))


def delete(uri: str) -> None:
    """Remove a file; one that is gone already is no error."""
    _guard(uri, lambda: _path(uri).unlink(missing_ok=True))


def _walk(folder: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it cannot read

    return sorted(
        str(Path(parent, name))
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if not name.startswith(_UNFINISHED)
    )


def list_files(prefix: str) -> Iterator[ObjectInfo]:
    """Yield the files under a folder, sorted by path; a prefix that is a file yields it."""
    root = _path(prefix)
    if root.is_file():
        yield stat(prefix)
        return
    for path in _guard(prefix, lambda: _walk(root)):
        try:
            yield stat(path)
        except StorageError as error:
            if Path(path).is_symlink():  # that leads nowhere: who opens it says so
                yield ObjectInfo(path, 0, "", 0)
            elif error.error_type != "not_found":  # else it is gone since
                raise


def write(uri: str, data: bytes | memoryview | pa.Buffer) -> None:
    """Write a file whole or not at all."""
    path = _path(uri)
    _guard(uri, lambda: _publish(path, data, lambda unfinished: unfinished.replace(path)))


def create(uri: str, data: bytes) -> bool:
    """Write a file unless there is one; return whether this call did."""
    return _guard(uri, lambda: _create(_path(uri), data))


def _create(path: Path, data: bytes) -> bool:
    try:
        _publish(path, data, path.hardlink_to)
    except FileExistsError:
        return False
    return True


def _publish(
    path: Path, data: bytes | memoryview | pa.Buffer, name: Callable[[Path], object]
) -> None:
    """Write a file beside `path`, durably, and let `name` give it that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        with unfinished.open("xb") as file:
            file.write(memoryview(data))
            file.flush()
            os.fsync(file.fileno())
        name(unfinished)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
