"""The curves of a run: curves.jsonl, and curves.png of its losses and accuracies."""

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnisift.training.state import TrainingError

_LOG = logging.getLogger(__name__)
_PANELS = ("loss", "accuracy")  # by the first word of a metric's name


class Curves:
    """Sum metrics on their device, and write their means now and then."""

    def __init__(self, folder: Path, start: int, *, writes: bool) -> None:
        """Go on behind step `start`: later lines, of a run that was killed, are taken back."""
        self._file = folder / "curves.jsonl"
        self._image = folder / "curves.png"
        self._writes = writes
        self._first = start + 1
        self._sums: dict[str, Tensor] = {}
        self._since = time.monotonic()
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(
                self._file,
                "".join(
                    json.dumps(line) + "\n"
                    for line in read_curves(self._file)
                    if line["step"] <= start
                ).encode(),
            )

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a step's metrics, without waiting for the device."""
        for name, value in metrics.items():
            sums = self._sums.setdefault(name, torch.zeros((), device=value.device))
            sums += value.detach()

    def write(self, step: int, learning_rate: float) -> None:
        """Write the means since the last line; the only place that waits for the device.

        Raises TrainingError, on every worker, for a metric that is not finite.
        """
        count = step - self._first + 1
        if not count:
            return
        names = list(self._sums)
        totals = torch.stack([self._sums[name] for name in names]).tolist()
        means = {name: total / count for name, total in zip(names, totals, strict=True)}
        bad = [name for name, mean in means.items() if not math.isfinite(mean)]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} not finite in steps {self._first} to {step}; lower the learning "
                "rate, or look at the data of these steps"
            )
        now = time.monotonic()
        line: dict[str, Any] = {"step": step, **means, "learning_rate": learning_rate}
        line["seconds_per_step"] = (now - self._since) / count
        self._sums, self._first, self._since = {}, step + 1, now
        if self._writes:
            with self._file.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
            _LOG.info("%s", " ".join(f"{name}={value:.4g}" for name, value in line.items()))

    def draw(self) -> None:
        """Write curves.png, where matplotlib is installed."""
        if not self._writes:
            return
        if importlib.util.find_spec("matplotlib") is None:
            _LOG.warning("no curves.png: pip install 'omnisift-pipeline[train]' for matplotlib")
            return
        draw_curves(self._file, self._image)


def read_curves(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a curves.jsonl; none for a file that is not there.

    A last line that breaks off, as a killed run leaves it, is left out.
    """
    if not file.exists():
        return []
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def draw_curves(file: Path, image: Path) -> None:
    """Draw the losses and the accuracies of a curves.jsonl side by side over the steps."""
    from matplotlib.figure import Figure

    lines = read_curves(file)
    figure = Figure(figsize=(11, 4), layout="constrained")
    for panel, axes in zip(_PANELS, figure.subplots(1, len(_PANELS)), strict=True):
        names = dict.fromkeys(name for line in lines for name in line if name.startswith(panel))
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set(xlabel="step", ylabel=panel)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize="small")
    partial = image.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(image)


def _write_atomically(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)
