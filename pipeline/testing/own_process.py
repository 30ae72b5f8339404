"""Measure in a process of its own, so that the memory it took is that of what was measured."""

import multiprocessing
import resource
from collections.abc import Callable
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


def in_own_process(
    measure: Callable[Arguments, None], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> None:
    """Call `measure` in a new process and wait for its end.

    Raises RuntimeError when it does not end well.
    """
    child = multiprocessing.get_context("spawn").Process(target=measure, args=args, kwargs=kwargs)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the measurement ended with {child.exitcode}")


def peak_memory_gib() -> float:
    """Return the most GiB that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
