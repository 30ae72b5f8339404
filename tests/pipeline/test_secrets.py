"""A run over a hostile manifest, and all that it leaves: no secret, and no pickle."""

import json
import os
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from omnisift.mini.tiny import write_tiny_model
from pipeline import rows
from pipeline.config import StorageConfig
from pipeline.storage import Storage, StorageError
from pipeline.testing.clips import render
from pipeline.testing.s3_server import S3Server

ROOT = Path(__file__).parents[2]
CANARY = "c4n4ryb1rd"
URIS = [
    "s3://{bucket}/videos/carphone.mp4",
    "s3://{bucket}/videos/truncated.mp4",
    "s3://{bucket}/videos/page.mp4",
    "s3://{bucket}/videos/gone.mp4",
    "s3://{bucket}-of-another/a.mp4",
    f"s3://AKIA{CANARY}:{CANARY}/{CANARY}@{{bucket}}/videos/a.mp4",
    f"s3://{{bucket}}/a.mp4?X-Amz-Credential={CANARY}&X-Amz-Signature={CANARY}",
    f"s3://{{bucket}}/a.mp4?X-Amz-Security-Token={CANARY}",
    f"https://store/a.mp4?AWSAccessKeyId=AKIA&Signature={CANARY}",
    f"http://user:{CANARY}@127.0.0.1/a.mp4",
]
BROKEN = [
    json.dumps({"uri": {"secret": CANARY}}),
    json.dumps({"video_key": CANARY}),
    f'{{"uri": "s3://{CANARY}:{CANARY}@b/a.mp4',
]
MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
FRAMES = (b"\x80\x04\x95", b"\x80\x05\x95")  # how a pickle begins, wherever it stands


@dataclass(frozen=True)
class Traces:
    """What a run left: what it said, Ray's files, and its objects."""

    said: str
    ray: dict[str, bytes]
    objects: dict[str, bytes]
    bucket: str
    secrets: list[bytes]


def _start(
    environment: dict[str, str], *arguments: str, temp_dir: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "caption_corpus.py"), *arguments],
        env={**os.environ, **environment, "RAY_TMPDIR": temp_dir, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def traces(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Traces:
    folder, client = tmp_path_factory.mktemp("secrets"), s3.client()
    bucket = f"secrets-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    for name, path in render(folder, ["carphone.mp4", "truncated.mp4", "page.mp4"]).items():
        client.upload_file(str(path), bucket, f"videos/{name}")
    lines = [json.dumps({"uri": uri.format(bucket=bucket)}) for uri in URIS]
    client.put_object(Bucket=bucket, Key="m.jsonl", Body="\n".join(lines + BROKEN).encode())
    arguments = [
        f"source=s3://{bucket}/m.jsonl",
        f"output=s3://{bucket}/output",
        f"model={write_tiny_model(folder / 'model', selector=True)}",
        "media.min_pixels=3136",
        "media.max_pixels=12544",
        "answer.max_new_tokens=2",
    ]
    # A short path: Ray puts Unix sockets under it.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp_dir:
        done = _start(s3.environment, *arguments, temp_dir=temp_dir)
        assert done.returncode == 0, done.stderr
        ray = {
            str(path): path.read_bytes()
            for path in Path(temp_dir).rglob("*")
            if path.is_file() and not path.is_symlink()
        }
    found = client.list_objects_v2(Bucket=bucket, Prefix="output/")["Contents"]
    objects = {
        entry["Key"]: client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        for entry in found
    }
    secrets = [CANARY.encode(), s3.access_key.encode(), s3.secret_key.encode()]
    return Traces(done.stdout + done.stderr, ray, objects, bucket, secrets)


def test_the_run_met_every_failure(traces: Traces) -> None:
    report = json.loads(next(v for k, v in traces.objects.items() if k.endswith("report.json")))
    assert report["failed_by_type"] == {
        "bad_manifest_row": 8,
        "not_found": 2,
        "not_a_video": 1,
        "truncated": 1,
    }
    assert report["videos_ok"] == 1
    assert "holds credentials or is presigned" in traces.said


def test_no_secret_is_in_what_it_said_or_in_rays_files(traces: Traces) -> None:
    assert len(traces.ray) > 20  # logs of the driver, the raylet and the workers
    for secret in traces.secrets:
        assert secret.decode() not in traces.said
        assert [name for name, content in traces.ray.items() if secret in content] == []


def test_no_secret_is_in_what_it_wrote(traces: Traces, tmp_path: Path) -> None:
    assert {name.rpartition(".")[2] for name in traces.objects} >= {"parquet", "json"}
    for name, content in traces.objects.items():
        text = content
        if name.endswith(".parquet"):
            (tmp_path / "part.parquet").write_bytes(content)
            columns = [
                field.name for field in pq.read_schema(tmp_path / "part.parquet")
                if field.name != "tokens"
            ]  # fmt: skip
            table = pq.read_table(tmp_path / "part.parquet", columns=columns)
            text = json.dumps(table.to_pylist(), default=str).encode()
            text += str(table.schema.metadata).encode()
        for secret in traces.secrets:
            assert secret not in text, name


def test_no_pickle_reaches_the_disk(traces: Traces, tmp_path: Path) -> None:
    """Not in the output, and not in Ray's folder, unless its memory spills (docs/security.md)."""
    for name, content in traces.ray.items():
        assert not content.startswith(MAGIC), name
        assert not any(frame in content for frame in FRAMES), name
    known = [rows.CACHED, rows.ANSWERS, rows.VIDEOS]
    for name, content in traces.objects.items():
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".parquet"):
            path = tmp_path / "part.parquet"
            path.write_bytes(content)
            schema = pq.read_schema(path)
            assert not any(b"pickle" in key for key in schema.metadata or {}), name
            assert "/work/" in name or any(schema.equals(one) for one in known), name
            for row in pq.read_table(path).to_pylist():
                if row.get("tokens") is not None:  # nothing but numbers fits there
                    length, width = row["token_shape"]
                    assert len(row["tokens"]) == length * width * 4
        else:
            assert content == b"" or name.endswith("_COMMITTED"), name
    assert any("/cache/" in name for name in traces.objects)


def test_what_the_store_refuses_is_said_without_the_token(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    cases = [
        ({"AWS_SESSION_TOKEN": CANARY * 3}, "forbidden"),
        ({"AWS_SECRET_ACCESS_KEY": CANARY * 3}, "forbidden"),
        ({"AWS_ENDPOINT_URL": f"http://u:{CANARY}@127.0.0.1:1"}, "forbidden"),
        ({"HTTP_PROXY": f"http://u:{CANARY}@127.0.0.1:1", "NO_PROXY": ""}, "storage_error"),
    ]
    for changes, error_type in cases:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
                if name == "HTTP_PROXY":
                    patch.setenv("AWS_ENDPOINT_URL", "http://store.invalid")
                    patch.setenv("AWS_ENDPOINT_URL_S3", "http://store.invalid")
                    patch.setenv("no_proxy", "")
            with pytest.raises(StorageError) as caught:
                Storage(StorageConfig(attempts=1, timeout_s=5)).stat("s3://bucket/a.mp4")
        assert caught.value.error_type == error_type
        assert CANARY not in str(caught.value)
