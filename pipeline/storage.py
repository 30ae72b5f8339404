"""Read and write objects by uri: `s3://bucket/key` or a local path (plain or `file://`).

A key is taken as it stands: spaces, '#', '?', '%' and unicode are never percent-encoded in a uri.
boto3 retries a request but not a body that breaks off, so reads are ranged here and continue
behind the last byte received.
"""

import io
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
import pyarrow as pa
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)

from pipeline.config import StorageConfig
from pipeline.redaction import holds_secret, redact

_T = TypeVar("_T")

S3 = "s3://"
_FILE = "file://"
_UNFINISHED = ".unfinished-"  # prefix of local files that are being written
_RANGE_BYTES = 32 << 20  # a request of a download; each may take `storage.attempts` tries
_CHUNK_BYTES = 1 << 20
_MULTIPART_BYTES = 64 << 20
_MAX_PAUSE_S = 20.0

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_FORBIDDEN = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_CHANGED = {"412", "416", "PreconditionFailed", "InvalidRange"}
_BUSY = {
    "ConditionalRequestConflict",
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "ServiceUnavailable",
}
_BROKEN_BODY = (IncompleteReadError, ResponseStreamingError, HTTPClientError, ConnectionError)


class StorageError(Exception):
    """An object that cannot be had; the text names the uri and what to do.

    `error_type`: not_found, forbidden, changed or storage_error.
    """

    def __init__(self, error_type: str, message: str) -> None:
        # both arguments: it must survive pickling
        super().__init__(error_type, redact(message))
        self.error_type = error_type

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells of an object. `etag` is "" for local files, `mtime_ns` 0 for S3."""

    uri: str
    size_bytes: int
    etag: str
    mtime_ns: int


def join(prefix: str, *parts: str) -> str:
    """Join a prefix and parts with one slash between each."""
    return "/".join([prefix.rstrip("/"), *(part.strip("/") for part in parts)])


def _split(uri: str) -> tuple[str, str]:
    """Return bucket and key; credentials written before the bucket are dropped, never used."""
    bucket, _, key = uri[len(S3) :].partition("/")
    return bucket.rpartition("@")[2], key


def _shown(uri: str) -> str:
    """Return the uri as messages may show it: without credentials."""
    return S3 + "/".join(_split(uri)) if uri.startswith(S3) else uri


def _local(uri: str) -> Path:
    return Path(uri.removeprefix(_FILE))


class Storage:
    """Objects by uri. May be pickled and shared by threads: each process makes its own client."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._forget_client()

    def _forget_client(self) -> None:
        self._lock = threading.Lock()
        self._made: Any = None
        self._made_in_pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._config = state["config"]
        self._forget_client()

    def list(self, prefix: str, *, suffixes: Sequence[str] = ()) -> Iterator[ObjectInfo]:
        """Yield the objects under a folder, recursively, sorted by uri.

        `suffixes` (lower case) select by the end of the name, whatever its case. A prefix that is
        itself an object yields that object. Raises StorageError where there is neither.
        """
        wanted = tuple(suffixes)
        listing = self._list_s3(prefix) if prefix.startswith(S3) else _list_local(prefix)
        for info in listing:
            if not wanted or info.uri.lower().endswith(wanted):
                yield info

    def stat(self, uri: str) -> ObjectInfo:
        """Return size and identity of one object. Raises StorageError not_found or forbidden."""
        if not uri.startswith(S3):
            return _stat_local(uri)
        bucket, key = _split(uri)
        head = self._request(uri, lambda s3: s3.head_object(Bucket=bucket, Key=key))
        return ObjectInfo(uri, head["ContentLength"], head["ETag"].strip('"'), 0)

    def exists(self, uri: str) -> bool:
        """Tell whether there is such an object."""
        try:
            self.stat(uri)
        except StorageError as error:
            if error.error_type == "not_found":
                return False
            raise
        return True

    def read(self, uri: str) -> bytes:
        """Return a whole object."""
        if not uri.startswith(S3):
            return _guard_local(uri, lambda: _local(uri).read_bytes())
        info = self.stat(uri)
        buffer = io.BytesIO()
        for start in range(0, info.size_bytes, _RANGE_BYTES):
            self._copy_range(info, start, min(start + _RANGE_BYTES, info.size_bytes), buffer)
        return buffer.getvalue()

    def download(self, info: ObjectInfo, path: Path) -> None:
        """Copy an object to `path`, all of it and as listed.

        Raises StorageError "changed" when its size or etag is no longer that of `info`.
        """
        with path.open("wb") as target:
            if info.uri.startswith(S3):
                for start in range(0, info.size_bytes, _RANGE_BYTES):
                    stop = min(start + _RANGE_BYTES, info.size_bytes)
                    self._copy_range(info, start, stop, target)
                return
            with _guard_local(info.uri, lambda: _local(info.uri).open("rb")) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
            if target.tell() != info.size_bytes:
                raise _changed(info.uri, f"{info.size_bytes} bytes listed, {target.tell()} found")

    def open(self, uri: str) -> BinaryIO:
        """Open an object for reading, seekable; from S3 come only the ranges that are read."""
        if not uri.startswith(S3):
            return _guard_local(uri, lambda: _local(uri).open("rb"))
        return io.BufferedReader(_RangedFile(self, self.stat(uri)), buffer_size=256 << 10)

    def write(self, uri: str, data: bytes | memoryview | pa.Buffer) -> None:
        """Write an object whole or not at all."""
        if not uri.startswith(S3):
            _guard_local(uri, lambda: _write_local(_local(uri), data))
            return
        bucket, key = _split(uri)
        view = memoryview(data)

        def put(s3: Any) -> None:
            if view.nbytes <= _MULTIPART_BYTES:
                s3.put_object(Bucket=bucket, Key=key, Body=bytes(view))
                return
            transfer = TransferConfig(multipart_threshold=_MULTIPART_BYTES, use_threads=False)
            s3.upload_fileobj(io.BytesIO(view), bucket, key, Config=transfer)

        self._request(uri, put)

    def create(self, uri: str, data: bytes) -> bool:
        """Write an object unless there is one; return whether this call is known to have done it.

        A store without conditional writes writes in any case, and one that refuses the condition is
        asked without it. After a lost answer also an object that is ours may count as there.
        """
        if not uri.startswith(S3):
            return _guard_local(uri, lambda: _create_local(_local(uri), data))
        bucket, key = _split(uri)

        def put(s3: Any) -> None:
            try:
                s3.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if error.response["Error"]["Code"] != "NotImplemented":
                    raise
                s3.put_object(Bucket=bucket, Key=key, Body=data)

        try:
            self._request(uri, put)
        except StorageError as error:
            if error.error_type != "changed":  # 412: there is one
                raise
            return False
        return True

    def delete(self, uri: str) -> None:
        """Remove an object; one that is gone already is no error."""
        if not uri.startswith(S3):
            _guard_local(uri, lambda: _local(uri).unlink(missing_ok=True))
            return
        bucket, key = _split(uri)
        self._request(uri, lambda s3: s3.delete_object(Bucket=bucket, Key=key))

    def read_range(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of an S3 object."""
        buffer = io.BytesIO()
        self._copy_range(info, start, stop, buffer)
        return buffer.getvalue()

    def _client(self) -> Any:
        with self._lock:
            if self._made is None or self._made_in_pid != os.getpid():
                endpoint = self._config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
                for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
                    if holds_secret(os.environ.get(name, "")):  # botocore's errors repeat it
                        raise StorageError(
                            "forbidden", f"{name} holds credentials; set them in AWS_* variables"
                        )
                self._made = boto3.session.Session().client(
                    "s3",
                    endpoint_url=endpoint or None,
                    config=Config(
                        connect_timeout=self._config.timeout_s,
                        read_timeout=self._config.timeout_s,
                        retries={"mode": "standard", "total_max_attempts": 2},
                        # Servers other than Amazon's may know neither bucket host names nor
                        # the checksums that boto3 adds by default.
                        s3={"addressing_style": "path" if endpoint else "auto"},
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                    ),
                )
                self._made_in_pid = os.getpid()
            return self._made

    def _list_s3(self, prefix: str) -> Iterator[ObjectInfo]:
        bucket, key = _split(prefix)
        folder = key if not key or key.endswith("/") else key + "/"
        query: dict[str, str] = {"Bucket": bucket, "Prefix": folder}
        found = False
        while True:
            page = self._request(prefix, lambda s3: s3.list_objects_v2(**query))
            for entry in page.get("Contents", ()):
                if entry["Key"].endswith("/"):
                    continue  # the marker of a folder
                found = True
                etag = entry["ETag"].strip('"')
                yield ObjectInfo(f"{S3}{bucket}/{entry['Key']}", entry["Size"], etag, 0)
            if not page.get("IsTruncated"):
                break
            query["ContinuationToken"] = page["NextContinuationToken"]
        if not found and key and not key.endswith("/"):
            yield self.stat(prefix)
        elif not found and key:
            raise _missing(prefix)

    def _copy_range(self, info: ObjectInfo, start: int, stop: int, target: BinaryIO) -> None:
        """Append bytes [start, stop) to `target`; a body that breaks off is continued."""
        bucket, key = _split(info.uri)
        position = start

        def fetch(s3: Any) -> None:
            nonlocal position
            wanted = {"Range": f"bytes={position}-{stop - 1}", "IfMatch": f'"{info.etag}"'}
            answer = s3.get_object(Bucket=bucket, Key=key, **wanted)
            body = answer["Body"]
            try:
                while position < stop and (chunk := body.read(_CHUNK_BYTES)):
                    target.write(chunk)
                    position += len(chunk)
            finally:
                body.close()
            if position < stop:
                raise ConnectionError(f"the body ended at byte {position} of {stop}")

        self._request(info.uri, fetch)

    def _request(self, uri: str, call: Callable[[Any], _T]) -> _T:
        """Make a request, again after faults that pass; raise StorageError for those that stay."""
        for attempt in range(1, self._config.attempts + 1):
            try:
                return call(self._client())
            except ClientError as error:
                if not _passes(error):
                    raise _refused(uri, error) from error
                fault: Exception = error
            except _BROKEN_BODY as error:
                fault = error
            except (NoCredentialsError, PartialCredentialsError) as error:
                raise _forbidden(uri, str(error)) from error
            except (BotoCoreError, ValueError) as error:  # e.g. an endpoint that is no URL
                message = f"{_shown(uri)}: {error}; check the uri and storage.endpoint_url"
                raise StorageError("storage_error", message) from error
            if attempt < self._config.attempts:
                longest = min(_MAX_PAUSE_S, 0.2 * 2**attempt)
                time.sleep(random.uniform(longest / 2, longest))
        raise StorageError(
            "storage_error",
            f"{_shown(uri)}: no complete answer in {self._config.attempts} tries "
            f"(storage.attempts); the last: {fault}. Run again when the store is well",
        ) from fault


class _RangedFile(io.RawIOBase):
    """An S3 object as a seekable file: every read is a ranged request."""

    def __init__(self, storage: Storage, info: ObjectInfo) -> None:
        super().__init__()
        self._storage = storage
        self._info = info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._info.size_bytes,
        }[whence]
        if origin + offset < 0:
            raise ValueError(f"seek before the start: {origin + offset}")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + view.nbytes, self._info.size_bytes)
        if stop <= self._position:
            return 0
        chunk = self._storage.read_range(self._info, self._position, stop)
        view[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)


def _passes(error: ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or error.response["Error"]["Code"] in _BUSY


def _refused(uri: str, error: ClientError) -> StorageError:
    code = str(error.response["Error"]["Code"])
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    if {code, status} & _MISSING:
        return _missing(uri)
    if {code, status} & _FORBIDDEN:
        return _forbidden(uri, code)
    if {code, status} & _CHANGED:
        return _changed(uri, code)
    return StorageError("storage_error", f"{_shown(uri)}: the store refused: {error}")


def _missing(uri: str) -> StorageError:
    return StorageError("not_found", f"{_shown(uri)}: does not exist; check bucket and key")


def _changed(uri: str, why: str) -> StorageError:
    return StorageError(
        "changed", f"{_shown(uri)}: changed since it was listed ({why}); run the job again"
    )


def _forbidden(uri: str, why: str) -> StorageError:
    """Say which credentials were in use, without showing them."""
    if uri.startswith(S3):
        credentials = boto3.session.Session().get_credentials()
        used = (
            f"credentials were found by '{credentials.method}'"
            if credentials
            else "no credentials were found in AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws or a role"
        )
        todo = "grant them s3:GetObject, s3:PutObject and s3:ListBucket, or use others"
    else:
        used, todo = f"this process runs as user {os.getuid()}", "grant it access to the file"
    return StorageError("forbidden", f"{_shown(uri)}: access refused ({why}); {used}; {todo}")


def _guard_local(uri: str, call: Callable[[], _T]) -> _T:
    """Run a file operation; say its failure as a StorageError."""
    try:
        return call()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError("not_found", f"{uri}: does not exist; check the path") from error
    except PermissionError as error:
        raise _forbidden(uri, error.strerror or "permission denied") from error
    except OSError as error:
        raise StorageError("storage_error", f"{uri}: {error.strerror}; check the disk") from error


def _info_local(uri: str) -> ObjectInfo:
    path = _local(uri)
    if path.is_dir():
        raise FileNotFoundError(uri)
    stat = path.stat()
    return ObjectInfo(uri, stat.st_size, "", stat.st_mtime_ns)


def _stat_local(uri: str) -> ObjectInfo:
    return _guard_local(uri, lambda: _info_local(uri))


def _walk(folder: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it cannot read

    return sorted(
        str(Path(parent, name))
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if not name.startswith(_UNFINISHED)
    )


def _list_local(prefix: str) -> Iterator[ObjectInfo]:
    root = _local(prefix)
    if root.is_file():
        yield _stat_local(prefix)
        return
    for path in _guard_local(prefix, lambda: _walk(root)):
        try:
            yield _stat_local(path)
        except StorageError as error:
            if Path(path).is_symlink():  # that leads nowhere: who opens it says so
                yield ObjectInfo(path, 0, "", 0)
            elif error.error_type != "not_found":  # else it is gone since
                raise


def _write_local(path: Path, data: bytes | memoryview | pa.Buffer) -> None:
    _publish(path, data, lambda unfinished: unfinished.replace(path))


def _create_local(path: Path, data: bytes) -> bool:
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
