"""What may be wrong with an object, in words that say what to do."""

import os
from dataclasses import dataclass

import boto3
from botocore.exceptions import ClientError, CredentialRetrievalError

from pipeline.redaction import redact

S3 = "s3://"

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_FORBIDDEN = {
    "401",
    "403",
    "AccessDenied",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_CHANGED = {"412", "416", "PreconditionFailed", "InvalidRange"}


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells of an object. `etag` is "" for local files, `mtime_ns` 0 for S3."""

    uri: str
    size_bytes: int
    etag: str
    mtime_ns: int


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


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key; credentials written before the bucket are dropped, never used."""
    bucket, _, key = uri[len(S3) :].partition("/")
    return bucket.rpartition("@")[2], key


def shown(uri: str) -> str:
    """Return the uri as messages may show it: without credentials."""
    return S3 + "/".join(split(uri)) if uri.startswith(S3) else uri


def refused(uri: str, error: ClientError) -> StorageError:
    """Return what an answer of S3 that stays means."""
    code = str(error.response["Error"]["Code"])
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    if {code, status} & _MISSING:
        return missing(uri)
    if {code, status} & _FORBIDDEN:
        return forbidden(uri, code)
    if {code, status} & _CHANGED:
        return changed(uri, code)
    return StorageError("storage_error", f"{shown(uri)}: the store refused: {error}")


def missing(uri: str) -> StorageError:
    """Say that there is no such object."""
    return StorageError("not_found", f"{shown(uri)}: does not exist; check bucket and key")


def changed(uri: str, why: str) -> StorageError:
    """Say that an object is another one than was listed."""
    return StorageError(
        "changed", f"{shown(uri)}: changed since it was listed ({why}); run the job again"
    )


def forbidden(uri: str, why: str) -> StorageError:
    """Say which credentials were in use, without showing them."""
    if uri.startswith(S3):
        try:
            credentials = boto3.session.Session().get_credentials()
            used = (
                f"credentials were found by '{credentials.method}'"
                if credentials
                else "no credentials were found in AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws or a role"
            )
        except CredentialRetrievalError:
            used = "the place that credentials come from gives none"
        rights = "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
        todo = f"grant them {rights}, or use others"
    else:
        used, todo = f"this process runs as user {os.getuid()}", "grant it access to the file"
    return StorageError("forbidden", f"{shown(uri)}: access refused ({why}); {used}; {todo}")
