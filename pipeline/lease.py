"""One run at a time on an output: a lease that its owner renews, and that others respect.

A lease is `<output>/_lease/<generation>.json`; the highest generation holds. It is created only
where there is none of that number (a conditional write, S3's If-None-Match; a link on a disk), so
of two that start at once one gets it. A store that ignores the condition keeps the later write:
each reads its own back after a pause, and again at every renewal. Only there, and only when a write
hangs for longer than the pause, may two believe to hold it, until the earlier one's next renewal.

Nobody's clock is trusted: a lease that stays as it is for as long as its owner may be silent, while
it is watched, is dead.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline.errors import StartupError
from pipeline.keys import plain
from pipeline.storage import S3, Storage, StorageError, join

log = logging.getLogger(__name__)

_RENEWALS = 4  # in the time after which a lease is dead
_SETTLE_S = 1.0  # for the write of another that started at the same moment


@dataclass(frozen=True)
class Owner:
    """Who holds an output, as the lease says it in JSON."""

    token: str  # of this lease alone
    command: str  # what runs: a job's name
    host: str
    pid: int
    process: str  # boot, process namespace and start: equal only for one and the same process
    renewed_at: str
    expires_at: str  # for a person; see the head of this file
    renewals: int = 0
    released: bool = False

    def __post_init__(self) -> None:
        """Refuse times that are none."""
        _ = self.expiry_s

    @property
    def expiry_s(self) -> float:
        """Return how long the owner may renew nothing: both times are of its own clock."""
        renewed, expires = map(datetime.fromisoformat, (self.renewed_at, self.expires_at))
        return (expires - renewed).total_seconds()

    def __str__(self) -> str:
        """Name the owner."""
        return f"{self.command} on {self.host}, process {self.pid}, renewed {self.renewed_at}"


class Lease:
    """A lease that is held. `check` raises when it is not any more."""

    def __init__(self, storage: Storage, uri: str, owner: Owner, expiry_s: float) -> None:
        self._storage, self._uri, self._expiry_s = storage, uri, expiry_s
        self._owner = owner
        self._renewed = time.monotonic()
        self._taken_by: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StartupError when another run may have taken the output."""
        late_s = time.monotonic() - self._renewed
        if self._taken_by is None and late_s < self._expiry_s:
            return
        why = self._taken_by or f"it could not be renewed for {late_s:.0f} s"
        raise StartupError(
            f"the lease {self._uri} is lost: {why}; nothing more is written, what was done is "
            "adopted by the next run"
        )

    def release(self) -> None:
        """Let the next run begin at once."""
        self._stop.set()
        self._thread.join()
        if self._taken_by is None:
            self._write(released=True)

    def _keep(self) -> None:
        while self._taken_by is None and not self._stop.wait(self._expiry_s / _RENEWALS):
            try:
                self._renew()
            except StorageError as error:
                log.warning("the lease %s could not be renewed: %s", self._uri, error)

    def _renew(self) -> None:
        for uri, holder in _leases(self._storage, self._uri.rpartition("/")[0]):
            if uri > self._uri or (uri == self._uri and holder.token != self._owner.token):
                self._taken_by = f"taken by {holder}"
                return
        started = time.monotonic()
        self._write(released=False)
        self._renewed = started

    def _write(self, *, released: bool) -> None:
        now = datetime.now(UTC)
        self._owner = replace(
            self._owner,
            renewals=self._owner.renewals + 1,
            released=released,
            renewed_at=_shown(now),
            expires_at=_shown(now + timedelta(seconds=self._expiry_s)),
        )
        self._storage.write(self._uri, _text(self._owner))


@contextmanager
def hold(
    storage: Storage, output: str, command: str, *, expiry_s: float, say: Callable[[str], None]
) -> Iterator[Lease]:
    """Hold the output until the block ends.

    Raises StartupError, which names the owner, when another run holds it. A lease that nobody
    renews is watched for `expiry_s`, its owner's where that is longer, and then taken; that of a
    dead process of this host at once.
    """
    folder = join(plain(output), "_lease")
    try:
        lease = _take(storage, folder, command, expiry_s, say)
    except StorageError as error:
        raise StartupError(f"output={output}: no lease can be had: {error}") from error
    try:
        yield lease
    finally:
        try:
            lease.release()
        except StorageError as error:
            log.warning("the lease could not be released: %s", error)


def _take(
    storage: Storage, folder: str, command: str, expiry_s: float, say: Callable[[str], None]
) -> Lease:
    leases = _leases(storage, folder)
    generation = 1
    if leases:
        last, holder = leases[-1]
        generation = int(last.rpartition("/")[2].removesuffix(".json")) + 1
        if not (holder.released or _is_dead(holder)):
            _watch(storage, last, holder, expiry_s, say)
    owner = _myself(command, expiry_s)
    uri = join(folder, f"{generation:08d}.json")
    storage.create(uri, _text(owner))
    if uri.startswith(S3):
        time.sleep(_SETTLE_S)
    uri_now, holder = _leases(storage, folder)[-1]
    if uri_now != uri or holder.token != owner.token:
        raise _refused(uri_now, holder)
    for old, _ in leases:
        storage.delete(old)
    return Lease(storage, uri, owner, expiry_s)


def _watch(
    storage: Storage, uri: str, holder: Owner, expiry_s: float, say: Callable[[str], None]
) -> None:
    """Return when nobody has renewed a lease for its whole time; raise when it is alive."""
    expiry_s = max(expiry_s, holder.expiry_s)  # its owner renews it by its own
    say(f"another run holds the output ({holder}); waiting up to {expiry_s:.0f} s to see it alive")
    deadline = time.monotonic() + expiry_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, expiry_s / (2 * _RENEWALS)))
        leases = _leases(storage, uri.rpartition("/")[0])
        if not leases:
            continue  # it was taken over between list and read
        last, now = leases[-1]
        if now.released and last == uri:
            return
        if last != uri or now != holder:
            raise _refused(last, now)


def _refused(uri: str, holder: Owner) -> StartupError:
    return StartupError(
        f"output: it is held by {holder}; wait for its end, or name another output (lease: {uri})"
    )


def _leases(storage: Storage, folder: str) -> list[tuple[str, Owner]]:
    """Return the leases of an output by generation; one that is deleted meanwhile is left out."""
    found = []
    try:
        for info in storage.list(folder, suffixes=(".json",)):
            try:
                if (text := _read(storage, info.uri)) is not None:
                    found.append((info.uri, Owner(**json.loads(text))))
            except (ValueError, TypeError) as error:
                raise StartupError(
                    f"the lease {info.uri} is broken: {error}; delete it when no run goes on"
                ) from error
    except StorageError as error:
        if error.error_type != "not_found":
            raise
    return found


def _read(storage: Storage, uri: str) -> bytes | None:
    """Return a lease as it is now; None: it was deleted meanwhile."""
    for _ in range(_RENEWALS):
        try:
            return storage.read(uri)
        except StorageError as error:
            if error.error_type == "not_found":
                return None
            if error.error_type != "changed":  # renewed while it was read
                raise
    raise StorageError("changed", f"{uri}: changed {_RENEWALS} times while it was read")


def _myself(command: str, expiry_s: float) -> Owner:
    now = datetime.now(UTC)
    return Owner(
        token=uuid.uuid4().hex,
        command=command,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=_process(os.getpid()),
        renewed_at=_shown(now),
        expires_at=_shown(now + timedelta(seconds=expiry_s)),
    )


def _process(pid: int) -> str:
    """Return what tells a process from all others of this boot; "" where the system says nothing.

    Raises ProcessLookupError when there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    if state == "Z":
        raise ProcessLookupError(pid)
    return f"{boot} {space} {rest[18]}"


def _is_dead(holder: Owner) -> bool:
    """Say whether the owner was a process of this host that is no more."""
    here = _process(os.getpid()).split()
    there = holder.process.split()
    if not here or here[:2] != there[:2]:
        return False
    try:
        return _process(holder.pid).split() != there
    except ProcessLookupError:
        return True


def _shown(time_: datetime) -> str:
    return time_.isoformat(timespec="milliseconds")


def _text(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=2) + "\n").encode()
