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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
import pyarrow as pa
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NoConnection

from pipeline import storage_local
from pipeline.config import StorageConfig
from pipeline.redaction import holds_secret
from pipeline.retry import passes
from pipeline.storage_errors import (
    S3,
    ObjectInfo,
    StorageError,
    changed,
    forbidden,
    missing,
    refused,
    shown,
    split,
)

__all__ = ["S3", "ObjectInfo", "Storage", "StorageError", "join"]

_T = TypeVar("_T")

_RANGE_BYTES = 32 << 20  # a request of a download; each may take `storage.attempts` tries
_CHUNK_BYTES = 1 << 20
_MULTIPART_BYTES = 64 << 20
_MAX_PAUSE_S = 20.0

# A connection that is refused or breaks off, a body that ends early, an answer that does not come,
# credentials that cannot be fetched just now.
_PASSING = (
    NoConnection,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
    CredentialRetrievalError,
)


def join(prefix: str, *parts: str) -> str:
    """Join a prefix and parts with one slash between each."""
    return "/".join([prefix.rstrip("/"), *(part.strip("/") for part in parts)])


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
        listing = (
            self._list_s3(prefix) if prefix.startswith(S3) else storage_local.list_files(prefix)
        )
        for info in listing:
            if not wanted or info.uri.lower().endswith(wanted):
                yield info

    def stat(self, uri: str) -> ObjectInfo:
        """Return size and identity of one object. Raises StorageError not_found or forbidden."""
        if not uri.startswith(S3):
            return storage_local.stat(uri)
        bucket, key = split(uri)
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
            return storage_local.read(uri)
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
            with storage_local.open_file(info.uri) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
            if target.tell() != info.size_bytes:
                raise changed(info.uri, f"{info.size_bytes} bytes listed, {target.tell()} found")

    def open(self, uri: str) -> BinaryIO:
        """Open an object for reading, seekable; from S3 come only the ranges that are read."""
        if not uri.startswith(S3):
            return storage_local.open_file(uri)
        return io.BufferedReader(_RangedFile(self, self.stat(uri)), buffer_size=256 << 10)

    def write(self, uri: str, data: bytes | memoryview | pa.Buffer) -> None:
        """Write an object whole or not at all."""
        if not uri.startswith(S3):
            storage_local.write(uri, data)
            return
        bucket, key = split(uri)
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
            return storage_local.create(uri, data)
        bucket, key = split(uri)

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
            storage_local.delete(uri)
            return
        bucket, key = split(uri)
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
        bucket, key = split(prefix)
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
            raise missing(prefix)

    def _copy_range(self, info: ObjectInfo, start: int, stop: int, target: BinaryIO) -> None:
        """Append bytes [start, stop) to `target`; a body that breaks off is continued."""
        bucket, key = split(info.uri)
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
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if not passes(status, error.response["Error"]["Code"]):
                    raise refused(uri, error) from error
                fault: Exception = error
            except _PASSING as error:
                fault = error
            except (NoCredentialsError, PartialCredentialsError) as error:
                raise forbidden(uri, str(error)) from error
            except (BotoCoreError, ValueError) as error:  # e.g. an endpoint that is no URL
                message = f"{shown(uri)}: {error}; check the uri and storage.endpoint_url"
                raise StorageError("storage_error", message) from error
            if attempt < self._config.attempts:
                longest = min(_MAX_PAUSE_S, 0.2 * 2**attempt)
                time.sleep(random.uniform(longest / 2, longest))
        tries = f"in {self._config.attempts} tries (storage.attempts); the last: {fault}"
        if isinstance(fault, CredentialRetrievalError):
            raise forbidden(uri, f"no credentials {tries}") from fault
        todo = "Run again when the store is well"
        if isinstance(fault, NoConnection):
            todo += "; if it is, check storage.endpoint_url"
        raise StorageError(
            "storage_error", f"{shown(uri)}: no complete answer {tries}. {todo}"
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
