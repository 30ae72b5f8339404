"""A Ray cluster of one node on loopback, with token authentication on, as `ray job` meets it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_START_DEADLINE_S = 90.0
_STOP_DEADLINE_S = 20.0
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Cluster:
    """Where the dashboard is, and the variables a client needs to be let in."""

    dashboard_url: str
    address: str  # what RAY_ADDRESS names
    environment: Mapping[str, str]
    session: int  # of its processes

    def workers(self) -> list[int]:
        """Return the processes that run tasks and actors now."""
        return _workers(_members(self.session, self.environment["RAY_TMPDIR"]))

    def submit(
        self,
        entrypoint: Sequence[str],
        *,
        working_dir: Path,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit` until the job ends; its exit status tells whether it succeeded.

        `environment` replaces the client's own, to see what a client without a token is told.
        """
        return subprocess.run(
            [
                *_RAY,
                *("job", "submit", "--address", self.dashboard_url),
                *("--working-dir", str(working_dir), "--", *entrypoint),
            ],
            env=self.environment if environment is None else environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def local_cluster(
    *, num_cpus: int, object_store_bytes: int = 256 << 20, host: str = "127.0.0.1"
) -> Iterator[Cluster]:
    """Run a cluster with `num_cpus` slots, whatever the machine has, until the block ends.

    One that gets a second node has 127.0.0.2 for its `host`.

    Raises RuntimeError with the end of its log when it does not come up.
    """
    # A short path: Ray puts Unix sockets under it, whose names may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        port, gcs_port = _free_port(), _free_port()
        environment = {
            **_without_ray(os.environ),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
            # Ray turns 127.0.0.1 into the machine's own address, unless it thinks this a laptop.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if host == "127.0.0.1" else "1",
            # a job's `python` is the one that runs the tests
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        start = [
            *_RAY,
            *("start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", host, "--port", str(gcs_port)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)),
            *("--dashboard-agent-listen-port", "0", "--ray-client-server-port", str(_free_port())),
            *("--num-cpus", str(num_cpus), "--object-store-memory", str(object_store_bytes)),
            *("--temp-dir", folder),
        ]
        log = Path(folder) / "start.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                start,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        cluster = Cluster(
            f"http://127.0.0.1:{port}", f"{host}:{gcs_port}", environment, process.pid
        )
        try:
            _await_jobs(process, cluster, log)
            yield cluster
        finally:
            _end(process, folder)


@contextmanager
def second_node(cluster: Cluster, *, num_cpus: int) -> Iterator["Node"]:
    """Run another node of a cluster until the block ends."""
    log = Path(cluster.environment["RAY_TMPDIR"]) / f"node-{secrets.token_hex(4)}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *_RAY,
                *("start", "--address", cluster.address, "--block", "--disable-usage-stats"),
                *("--node-ip-address", "127.0.0.3", "--num-cpus", str(num_cpus)),
                *("--object-store-memory", str(128 << 20)),
            ],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    node = Node(process.pid)
    try:
        deadline = time.monotonic() + _START_DEADLINE_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the node did not come up: {log.read_text(errors='replace')}")
            time.sleep(0.1)
        yield node
    finally:
        node.kill()
        process.wait(_STOP_DEADLINE_S)


@dataclass(frozen=True)
class Node:
    """A node of a cluster, by the session of its processes."""

    session: int

    def workers(self) -> list[int]:
        """Return its processes that run tasks and actors now."""
        return _workers(of_session(self.session))

    def kill(self) -> None:
        """Kill the raylet and all else of the node at once."""
        for pid in of_session(self.session):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def of_session(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append(int(entry.name))
    return found


def _workers(pids: Sequence[int]) -> list[int]:
    found = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ")
            # Without one of its agents a raylet ends itself, which is the death of a node.
            if name.startswith(b"ray::") and not name.endswith(b"Agent"):
                found.append(pid)
    return found


def _await_jobs(process: subprocess.Popen[bytes], cluster: Cluster, log: Path) -> None:
    """Wait until the job server answers: it comes up seconds after the dashboard."""
    request = urllib.request.Request(
        f"{cluster.dashboard_url}/api/jobs/",
        headers={"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the Ray cluster did not come up; its log ends:\n{tail}")


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    """End the head, then whatever of the cluster outlives it; return when nothing does."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + _STOP_DEADLINE_S
    while (left := _members(process.pid, folder)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert not left, f"processes of the cluster that cannot be ended: {left}"


def _members(session: int, folder: str) -> list[int]:
    """Return the living processes of a cluster.

    Ray's own stay in the head's session, but overwrite their environment with a title; a job has a
    session of its own, but keeps its environment, in which `folder` is the RAY_TMPDIR.
    """
    marker = f"RAY_TMPDIR={folder}".encode()
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            inside = int(sid) == session or marker in (entry / "environ").read_bytes().split(b"\0")
            if inside and state != "Z":  # an ended one waits for its parent: nothing left to end
                members.append(int(entry.name))
    return members


def _without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out what would join another cluster."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
