"""An S3 server on a bad night: a reverse proxy on loopback that breaks a share of the answers."""

import asyncio
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import unquote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%b"
)
_BUSY_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"


_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
_REFUSED = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%b"
)
_DECK = 20  # requests among which each fault has exactly its share


@dataclass(frozen=True)
class Shares:
    """Shares of the requests that are answered 503, reset, with half a body, or with a stall."""

    busy: float = 0.0
    reset: float = 0.0
    cut: float = 0.0
    slow: float = 0.0
    stall_s: float = 5.0  # in the middle of a slow body


@dataclass(frozen=True)
class AgingKeys:
    """Temporary keys `AGED-<seconds since 1970>`, which the store behind does not know."""

    lifetime_s: float
    access_key: str  # of the store behind, by which requests are signed anew
    secret_key: str


@dataclass
class FaultProxy:
    """A running proxy; `counts` says what became of the requests, by fault ("" for none)."""

    upstream: tuple[str, int]
    shares: Shares
    random: random.Random
    keys: AgingKeys | None = None
    on_get: Callable[[str, int], None] | None = None  # told the path and the client's port
    port: int = 0
    gone_until: float = 0.0  # of time.monotonic: until then no connection is answered
    counts: Counter[str] = field(default_factory=Counter)
    keys_from: float = 0.0  # keys issued before that have expired
    keys_seen: set[str] = field(default_factory=set)
    deck: list[str] = field(default_factory=list)

    @property
    def endpoint_url(self) -> str:
        """Return what clients take for the store."""
        return f"http://127.0.0.1:{self.port}"

    def draw(self) -> str:
        """Return the next request's fault: of each deck of requests exactly the shares."""
        if not self.deck:
            for fault in ("busy", "reset", "cut", "slow"):
                self.deck += [fault] * round(_DECK * getattr(self.shares, fault))
            self.deck += [""] * (_DECK - len(self.deck))
            self.random.shuffle(self.deck)
        return self.deck.pop()

    def fault_of(self, headers: dict[str, str]) -> str:
        """Return what is to become of a request."""
        if time.monotonic() < self.gone_until:
            return "gone"
        if self.keys is not None:
            key = headers["authorization"].partition("Credential=")[2].partition("/")[0]
            self.keys_seen.add(key)
            issued = float(key.partition("-")[2])
            if issued < max(self.keys_from, time.time() - self.keys.lifetime_s):
                return "expired"
        return self.draw()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            headers = _headers(head)
            if "expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            fault = self.fault_of(headers)
            self.counts[fault] += 1
            if self.on_get is not None and head.startswith(b"GET "):
                port = writer.get_extra_info("peername")[1]
                self.on_get(unquote(head.split(b" ", 2)[1].decode()), port)
            if fault in ("reset", "gone"):
                linger = struct.pack("ii", 1, 0)  # a close that is a reset
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
            elif fault == "busy":
                writer.write(_BUSY % (len(_BUSY_BODY), _BUSY_BODY))
            elif fault == "expired":
                answer = _REFUSED % (len(_EXPIRED), _EXPIRED)
                writer.write(answer[: -len(_EXPIRED)] if head.startswith(b"HEAD ") else answer)
            else:
                await self._pass_on(head, body, fault, writer)
            if fault not in ("reset", "gone"):
                await writer.drain()
        writer.close()

    async def _pass_on(
        self, head: bytes, body: bytes, fault: str, writer: asyncio.StreamWriter
    ) -> None:
        if self.keys is not None:
            head = _signed_anew(head, body, self.keys)
        answer = await self._ask(head, body)
        start = answer.find(b"\r\n\r\n") + 4
        middle = (start + len(answer)) // 2
        if fault == "slow" and len(answer) > start:
            writer.write(answer[:middle])
            await writer.drain()
            await asyncio.sleep(self.shares.stall_s)
            writer.write(answer[middle:])
        else:
            writer.write(answer[:middle] if fault == "cut" and len(answer) > start else answer)

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """Pass a request on as it was signed, and return the whole answer."""
        reader, writer = await asyncio.open_connection(*self.upstream)
        lines = [
            line
            for line in head.rstrip(b"\r\n").split(b"\r\n")
            if not line.lower().startswith((b"connection:", b"expect:"))
        ]
        writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        answer = await reader.read(-1)
        writer.close()
        return answer


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


def _signed_anew(head: bytes, body: bytes, keys: AgingKeys) -> bytes:
    """Return the head of a request as one who holds the store's own keys would send it."""
    line, _, _ = head.partition(b"\r\n")
    method, target, _ = line.decode().split(" ", 2)
    headers = _headers(head)
    kept = {
        name: value
        for name, value in headers.items()
        if name not in ("authorization", "x-amz-security-token", "x-amz-date", "expect")
    }
    request = AWSRequest(method, f"http://{headers['host']}{target}", kept, body)
    S3SigV4Auth(Credentials(keys.access_key, keys.secret_key), "s3", "us-east-1").add_auth(request)
    lines = [line, *(f"{name}: {value}".encode() for name, value in request.headers.items())]
    return b"\r\n".join([*lines, b"", b""])


@contextmanager
def fault_proxy(
    upstream_url: str,
    *,
    seed: int = 0,
    shares: Shares = Shares(),
    keys: AgingKeys | None = None,
    on_get: Callable[[str, int], None] | None = None,
) -> Iterator[FaultProxy]:
    """Run a proxy in front of `upstream_url`, in a thread, until the block ends."""
    host, _, port = upstream_url.removeprefix("http://").partition(":")
    proxy = FaultProxy((host, int(port)), shares, random.Random(seed), keys, on_get)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def run(stop: asyncio.Event) -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
        proxy.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(stop),))
    thread.start()
    started.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
