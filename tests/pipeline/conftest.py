import uuid
from pathlib import Path

import pytest

from pipeline.testing.s3_server import S3Server
from tests.pipeline.corpus import Corpus


@pytest.fixture
def on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    client, bucket = s3.client(), f"rerun-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)

    def put(name: str, content: bytes) -> None:
        client.put_object(Bucket=bucket, Key=name, Body=content)

    return Corpus(f"s3://{bucket}", put)


@pytest.fixture
def on_disk(tmp_path: Path) -> Corpus:
    def put(name: str, content: bytes) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    return Corpus(str(tmp_path), put)


@pytest.fixture(params=["on_disk", "on_s3"])
def corpus(request: pytest.FixtureRequest) -> Corpus:
    found: Corpus = request.getfixturevalue(request.param)
    return found
