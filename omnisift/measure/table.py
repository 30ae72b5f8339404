"""What the parts are measured at, and a line of the table each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnisift.measure.timing import Times

RETAIN = 0.25


@dataclass(frozen=True)
class Sizes:
    """What is measured: one video with sound, 2 frames a second."""

    config: Any  # a Qwen2_5OmniThinkerConfig
    grids: int  # of a video, one a second
    side: int  # tokens of a grid, down and across
    chunks: tuple[int, ...]  # for the cost of one more
    kept_tokens: int  # for the prefill
    questions: int  # about them
    answer_tokens: int
    rounds: int


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|."""
    wanted = expected.double()
    return float((actual.double() - wanted).norm() / wanted.norm())


def line(part: str, ours: Times, other: Times | None, note: str = "") -> str:
    """Return one line of the table."""
    against = "" if other is None else f"{other}"
    factor = "" if other is None else f"{other.median_ms / ours.median_ms:.2f}x"
    return f"| {part} | {ours} | {against} | {factor} | {note} |"
