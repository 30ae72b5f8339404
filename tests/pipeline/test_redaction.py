"""Secrets in uris are found, and blanked in messages, however they are written."""

import pytest

from pipeline.config import (
    CacheConfig,
    CaptionConfig,
    CompactConfig,
    ListingConfig,
    ShowConfig,
    StorageConfig,
    VerifyConfig,
)
from pipeline.redaction import holds_secret, redact
from pipeline.storage import StorageError

SECRET = "c4n4ry/S3cret+Key=="
URIS = [
    f"s3://AKIACANARY:{SECRET}@bucket/a.mp4",  # its slash ends what looks like the bucket
    "s3://AKIACANARY@bucket/a.mp4",
    f"http://user:{SECRET}@store:9000",
    f"https://{SECRET.replace('/', '')}@store:9000/bucket/a.mp4",
    "s3://bucket/a.mp4?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIACANARY%2F2026",
    "s3://bucket/a.mp4?versionId=3&x-amz-signature=0123456789abcdef",
    "s3://bucket/a.mp4?X-Amz-Security-Token=FwoGZXIvYXdzEBYaD",
    "https://bucket.s3.amazonaws.com/a.mp4?AWSAccessKeyId=AKIACANARY&Expires=1&Signature=vjbyPxyb",
    "https://account.blob.core.windows.net/c/a.mp4?sv=2024&sig=c4n4ry%3D",
]
PLAIN = [
    "s3://bucket/videos",
    "s3://bucket/who?.mp4",
    "s3://bucket/a@b:c.mp4",
    "s3://bucket/signature=1.mp4",
    "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/a.mp4",
    "/data/user@host:1/a.mp4",
    "file:///data/a.mp4",
    "http://127.0.0.1:9000",
    "Qwen/Qwen2.5-Omni-7B",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_uri_with_credentials_is_told_from_others(uri: str) -> None:
    assert holds_secret(uri)


@pytest.mark.parametrize("uri", PLAIN)
def test_a_plain_uri_is_none(uri: str) -> None:
    assert not holds_secret(uri)
    assert redact(f"{uri}: does not exist") == f"{uri}: does not exist"


@pytest.mark.parametrize("uri", URIS)
def test_no_key_takes_credentials_and_no_refusal_repeats_them(uri: str) -> None:
    for make in (
        lambda: CaptionConfig(source=uri, output="out"),
        lambda: CaptionConfig(source="in", output=uri),
        lambda: CaptionConfig(source="in", output="out", model=uri),
        lambda: ListingConfig(roots=["videos", uri]),
        lambda: CacheConfig(path=uri),
        lambda: StorageConfig(endpoint_url=uri),
        lambda: ShowConfig(output=uri),
        lambda: CompactConfig(output=uri),
        lambda: CompactConfig(output="out", cache=uri),
        lambda: VerifyConfig(output=uri),
    ):
        with pytest.raises(ValueError, match="holds credentials; leave them") as caught:
            make()
        assert uri not in str(caught.value)


def test_messages_lose_what_the_environment_and_uris_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEBYaD")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")  # too short to be told from words
    for uri in URIS:
        message = str(StorageError("storage_error", f'no answer from "{uri}"; try again'))
        assert message.endswith('"; try again')
        for secret in (SECRET, "FwoGZXIvYXdzEBYaD", "0123456789abcdef", "vjbyPxyb", "c4n4ry"):
            assert secret not in message
    assert redact(f"the key {SECRET} and a word") == "the key *** and a word"
