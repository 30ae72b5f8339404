import dataclasses
import hashlib
import os
import socket
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from pipeline.testing import s3_server as module
from pipeline.testing.s3_server import S3Server, s3_server

KEYS = ["plain.mp4", "a folder/with spaces.mp4", "日本/ü#?%20&+=.mp4"]


@pytest.mark.parametrize("key", KEYS)
def test_an_object_comes_back_whole_and_in_ranges(s3: S3Server, key: str) -> None:
    client = s3.client()
    body = bytes(range(256)) * 5
    bucket = f"objects-{KEYS.index(key)}"
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key=key, Body=body)
    assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == body
    part = client.get_object(Bucket=bucket, Key=key, Range="bytes=250-259")
    assert part["Body"].read() == body[250:260]
    head = client.head_object(Bucket=bucket, Key=key)
    assert head["ContentLength"] == len(body)
    # S3 promises the MD5 as the etag of an object put in one part
    assert head["ETag"].strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest()


def test_keys_are_listed_as_they_were_put(s3: S3Server) -> None:
    client = s3.client()
    client.create_bucket(Bucket="listing")
    for key in KEYS:
        client.put_object(Bucket="listing", Key=key, Body=b"x")
    # two a page, so that the listing must be continued
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="listing", PaginationConfig={"PageSize": 2}
    )
    listed = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    assert sorted(listed) == sorted(KEYS)


def test_a_wrong_secret_is_refused(s3: S3Server) -> None:
    s3.client().create_bucket(Bucket="guarded")
    stranger = dataclasses.replace(s3, secret_key="0" * 32)
    with pytest.raises(ClientError) as refused:
        stranger.client().list_objects_v2(Bucket="guarded")
    assert refused.value.response["Error"]["Code"] == "SignatureDoesNotMatch"


def test_its_environment_is_enough_for_a_bare_client(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.client().create_bucket(Bucket="from-environment")
    # a session of its own, since boto3's default one keeps what it first found
    bare = boto3.session.Session().client("s3")
    assert "from-environment" in [bucket["Name"] for bucket in bare.list_buckets()["Buckets"]]


def test_it_is_gone_when_its_block_ends(tmp_path: Path) -> None:
    with s3_server(tmp_path) as server:
        client = server.client()
        client.create_bucket(Bucket="left")
        client.put_object(Bucket="left", Key="behind", Body=b"kept")
    with pytest.raises(EndpointConnectionError):
        client.list_buckets()
    # the buckets stay in the folder, for other credentials and another port
    with s3_server(tmp_path) as again:
        assert again.access_key != server.access_key
        assert again.client().get_object(Bucket="left", Key="behind")["Body"].read() == b"kept"


def test_a_server_that_cannot_start_shows_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(module, "_free_port", lambda: taken.getsockname()[1])
        # the taken port accepts and says nothing: only the end of the process tells
        with pytest.raises(RuntimeError, match="port is already in use"), s3_server(tmp_path):
            pass
