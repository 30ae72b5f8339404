"""What an engine is asked and what it returns, whichever it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from omnisift.answer import Answer
from omnisift.compressor import KeptTokens


@dataclass(frozen=True)
class Question:
    """One prompt about a video."""

    text: str
    choices: tuple[str, ...] = ()  # the answer is the likeliest of these; empty: free text
    seed: int = 0  # of this prompt's own sampling; unused where nothing is sampled


@dataclass(frozen=True, eq=False)
class AskedVideo:
    """The kept tokens of a video and what is asked of it."""

    key: str  # equal keys, equal tokens: an engine may remember what it made of them
    kept: KeptTokens
    questions: Sequence[Question]


@dataclass(frozen=True)
class Refusal:
    """Why a question has no answer. `error_type` is a stable word of pipeline.retry."""

    error_type: str
    message: str


class Engine(Protocol):
    """Answer the questions of many videos, in their order."""

    def __call__(self, videos: Sequence[AskedVideo]) -> list[list[Answer | Refusal]]:
        """Return an answer or a refusal for each question of each video."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
