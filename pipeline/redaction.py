"""Keep secrets out of what is written: find them in uris, blank them in messages."""

import os
import re

_HIDDEN = "***"
# Query parameters by which a presigned URL carries its right, at Amazon, Google and Azure.
_SIGNED = (
    r"(?:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|X-Goog-(?:Signature|"
    r"Credential)|Signature|Credential|sig)"
)
_SIGNED_QUERY = re.compile(rf"[?&]{_SIGNED}=", re.IGNORECASE)
_SIGNED_VALUE = re.compile(rf"([?&]{_SIGNED}=)[^&\s'\"<>,)]+", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^\s/@'\"]*(?::[^\s@'\"]*)?@")
_S3_BUCKET = re.compile(r"s3://(?!arn:)[^/]*[@:]", re.IGNORECASE)  # no bucket has these in its name
_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "RAY_AUTH_TOKEN",
)
_SHORTEST = 8  # a shorter value would blank words of the message


def holds_secret(uri: str) -> bool:
    """Tell whether a uri carries credentials: before the host, or as the query that signs it.

    A secret key may hold slashes, so before an S3 bucket a colon is enough.
    """
    return bool(_S3_BUCKET.match(uri) or _USER_INFO.search(uri) or _SIGNED_QUERY.search(uri))


def redact(text: str) -> str:
    """Return a message without the secrets of this process's environment and of uris in it."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    return _SIGNED_VALUE.sub(rf"\g<1>{_HIDDEN}", _USER_INFO.sub(f"{_HIDDEN}@", text))
