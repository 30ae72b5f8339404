"""How much of a GPU all processes on it hold, seen from outside."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY_MS = 100


def first_gpu() -> str:
    """Return the index or uuid of the first GPU that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def ask_gpu(*fields: str) -> list[str]:
    """Return what nvidia-smi says of the first GPU; nothing where there is none.

    CUDA stays untouched in this process: a context would be counted, and forks would fail.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    found = subprocess.run([*asked, "-i", first_gpu()], capture_output=True, text=True, check=True)
    return [field.strip() for field in found.stdout.strip().split(",")]


@contextmanager
def watch_gpu_memory() -> Iterator[Callable[[], float | None]]:
    """Give what returns, once the block has ended, the most GiB in use during it; None: no GPU."""
    peak: list[float] = []
    if shutil.which("nvidia-smi") is None:
        yield lambda: None
        return
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    watching = subprocess.Popen(
        [*asked, "-i", first_gpu(), "-lms", str(_EVERY_MS)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield lambda: max(peak, default=None)
    finally:
        watching.terminate()
        said, _ = watching.communicate()
        peak += [int(line) / 1024 for line in said.split() if line.isdigit()]
