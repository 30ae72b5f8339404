"""Clocks that know that a GPU works on its own."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs."""

    runs: list[float]

    @property
    def median_ms(self) -> float:
        """Return the median in milliseconds."""
        return statistics.median(self.runs) * 1e3

    def __str__(self) -> str:
        """Write median and range."""
        low, high = min(self.runs) * 1e3, max(self.runs) * 1e3
        return f"{self.median_ms:.2f} ms ({low:.2f}-{high:.2f})"


def settle(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Turn every wait of the host for the GPU into an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def alternately(
    versions: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, Times]:
    """Time the versions in turns, so that a drift of the machine meets them all."""
    runs: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(rounds + 2):
        for name, version in versions.items():
            settle(device)
            start = time.perf_counter()
            version()
            settle(device)
            if turn >= 2:  # the first ones compile and allocate
                runs[name].append(time.perf_counter() - start)
    return {name: Times(seconds) for name, seconds in runs.items()}


def behind_other_work(call: Callable[[], Any], device: torch.device, rounds: int) -> Times:
    """Time a call on the device alone: its launches are queued while something else runs."""
    if device.type == "cpu":
        return alternately({"call": call}, device, rounds)["call"]
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    calls, runs = 4, []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(40):  # about 60 ms, as the towers would
            matrix @ matrix
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        runs.append(start.elapsed_time(end) / calls / 1e3)
    return Times(runs)
