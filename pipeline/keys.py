"""Names made of content: video keys, prompt ids, fingerprints and run ids.

Every file of a cache or an output is found again by these, so a change here orphans what was paid
for: the golden test fixes each of them.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pipeline.config import AnswerConfig
from pipeline.storage import S3, ObjectInfo

Ingredient = str | int | float | bool


def _digest(*parts: Ingredient) -> str:
    # JSON keeps ("ab", "c") and ("a", "bc") apart, and is ASCII whatever bytes a file name holds.
    return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()


def without_credentials(uri: str) -> str:
    """Return an S3 uri without the `user:secret@` that may stand before the bucket."""
    if not uri.startswith(S3):
        return uri
    bucket, slash, key = uri[len(S3) :].partition("/")
    return f"{S3}{bucket.rpartition('@')[2]}{slash}{key}"


def plain(uri: str) -> str:
    """Return a uri as listings spell it: no slash at its end, no credentials, no file://."""
    if uri.startswith(S3):
        return without_credentials(uri).rstrip("/")
    return os.path.normpath(uri.removeprefix("file://"))


def video_key(info: ObjectInfo, *, root: str, content_sha256: str | None = None) -> str:
    """Return the sha256 (64 hex digits) of a video's content identity.

    S3: uri without credentials, etag, size. Local: path relative to `root`, size, mtime. With
    `content_sha256` the content alone, so that a copy or a moved file is the same video.
    """
    if content_sha256 is not None:
        return _digest("content", content_sha256)
    if info.uri.startswith(S3):
        return _digest("s3", without_credentials(info.uri), info.etag.strip('"'), info.size_bytes)
    path = os.path.relpath(plain(info.uri), plain(root))
    return _digest("local", path, info.size_bytes, info.mtime_ns)


def window_key(video_key: str, window_s: float, number: int, *, last: bool) -> str:
    """Return the key of a window of a video that is cut every `window_s` seconds.

    Whether it is the last is part of it: which windows a video has is then known from the keys
    that an index holds, without asking the video again.
    """
    return _digest("window", video_key, float(window_s), number, last)


def missing_key(uri: str) -> str:
    """Return the key of an object that could not be probed, or of a broken manifest line."""
    return _digest("missing", without_credentials(uri))


def prompt_id(prompt: str, choices: Sequence[str] | None = None) -> str:
    """Return the id of a prompt that the manifest does not name: 16 hex digits of its sha256."""
    if choices:
        return _digest(prompt, *choices)[:16]
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def fingerprint(ingredients: Mapping[str, Ingredient]) -> str:
    """Return the sha256 of everything that changes a result; the order of names is irrelevant.

    Raises ValueError for NaN and infinity, which have no canonical JSON.
    """
    canonical = json.dumps(
        dict(ingredients), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def answer_fingerprint(cache_fingerprint: str, answer: AnswerConfig) -> str:
    """Return what ANSWERS.fingerprint holds: kept tokens and answer settings in one hash.

    `cache_fingerprint` covers model, revision and compression. The prompt is not in it, since an
    answer is found by its own prompt; nor is batch_videos, which does not change a text, nor the
    engine: both give the same answers but for rounding. The other settings are in it where they
    are not the default, so that answers that were there before them still count.
    """
    default = AnswerConfig()
    special: dict[str, Ingredient] = {
        name: getattr(answer, name)
        for name in ("temperature", "top_p", "json_schema", "quantization", "kv_cache_dtype")
        if getattr(answer, name) != getattr(default, name)
    }
    if answer.stop:
        special["stop"] = json.dumps(answer.stop)
    if answer.temperature:
        special["seed"] = answer.seed
    return fingerprint(
        {
            "cache": cache_fingerprint,
            "system_prompt": answer.system_prompt,
            "max_new_tokens": answer.max_new_tokens,
            **special,
        }
    )


def new_run_id() -> str:
    """Return a name for a run; the names of later runs sort behind."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
