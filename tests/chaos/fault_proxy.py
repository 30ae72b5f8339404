"""An S3 server on a bad night: a reverse proxy on loopback that breaks a share of the answers."""

import asyncio
import random
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET

_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%b"
)
_BUSY_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"


@dataclass(frozen=True)
class Shares:
    """Shares of the requests that are answered 503, reset, or with half a body."""

    busy: float = 0.2
    reset: float = 0.1
    cut: float = 0.1


@dataclass
class FaultProxy:
    """A running proxy; `counts` says what became of the requests, by fault ("" for none)."""

    upstream: tuple[str, int]
    shares: Shares
    random: random.Random
    port: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def endpoint_url(self) -> str:
        """Return what clients take for the store."""
        return f"http://127.0.0.1:{self.port}"

    def draw(self) -> str:
        """Return the next request's fault."""
        place = self.random.random()
        for fault in ("busy", "reset", "cut"):
            place -= getattr(self.shares, fault)
            if place < 0:
                return fault
        return ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            headers = _headers(head)
            if "expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            fault = self.draw()
            self.counts[fault] += 1
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)  # a close that is a reset
                writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
            elif fault == "busy":
                writer.write(_BUSY % (len(_BUSY_BODY), _BUSY_BODY))
            else:
                answer = await self._ask(head, body)
                start = answer.find(b"\r\n\r\n") + 4
                cut = fault == "cut" and len(answer) > start
                writer.write(answer[: (start + len(answer)) // 2] if cut else answer)
            if fault != "reset":
                await writer.drain()
        writer.close()

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


@contextmanager
def fault_proxy(upstream_url: str, *, seed: int, shares: Shares) -> Iterator[FaultProxy]:
    """Run a proxy in front of `upstream_url`, in a thread, until the block ends."""
    host, _, port = upstream_url.removeprefix("http://").partition(":")
    proxy = FaultProxy((host, int(port)), shares, random.Random(seed))
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
