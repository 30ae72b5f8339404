"""Hold CPUs of Ray's back for a while, so that actors which need them start later than others."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.testing.thread_beside import thread_beside

_EVERY_S = 0.1


class _Holder:
    def ready(self) -> None:
        """Say that the CPUs are held."""


@contextmanager
def held_cpus(cpus: float, until: Callable[[], bool]) -> Iterator[list[float]]:
    """Take CPUs for as long as `until()` is false, at most while the block runs.

    Gives a list for the seconds after which `until()` was true: empty if the block ends first.
    """
    held_s: list[float] = []
    if cpus <= 0:
        yield held_s
        return
    holder: Any = ray.remote(_Holder).options(num_cpus=cpus).remote()
    ray.get(holder.ready.remote())
    start = time.monotonic()

    def release(over: threading.Event) -> None:
        while not over.wait(_EVERY_S):
            if until():
                held_s.append(time.monotonic() - start)
                break
        ray.kill(holder)

    with thread_beside(release):
        yield held_s
