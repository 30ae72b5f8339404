"""The text and the positions around the kept tokens: what every engine must place alike.

Shapes: n kept tokens, L tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from omnisift.compressor import KeptTokens, TooLongError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class BadTokensError(ValueError):
    """Kept tokens that do not fit the model, or do not fit together."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default takes the likeliest."""

    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens of this total probability
    stop: tuple[str, ...] = ()  # the answer ends in front of any of these
    json_schema: str = ""  # the answer is JSON of this schema; only vLLM can

    def __post_init__(self) -> None:
        """Refuse what nothing can be sampled with."""
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not all(self.stop):
            raise ValueError("a stop text must not be empty")


class PromptText:
    """The published chat template: a system turn, a user turn that opens with the video."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> None:
        """Raise ValueError where the tokenizer lacks a mark of the template."""
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        missing = [mark for mark in (IM_START, IM_END, END_OF_TEXT) if mark not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}")
        self._im_start: int = vocabulary[IM_START]
        self.im_end: int = vocabulary[IM_END]
        self.ends: tuple[int, ...] = (self.im_end, vocabulary[END_OF_TEXT])
        self.before_video: list[int] = [
            self._im_start,
            *self._encode(f"system\n{system_prompt}"),
            self.im_end,
            *self._encode("\n"),
            self._im_start,
            *self._encode("user\n"),
        ]

    def _encode(self, text: str) -> list[int]:
        # Text that spells a special token stays text: a prompt cannot forge a turn.
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        ).input_ids
        return ids

    def after_video(self, question: str) -> list[int]:
        """Return the ids between the kept tokens and the answer."""
        return [
            *self._encode(question),
            self.im_end,
            *self._encode("\n"),
            self._im_start,
            *self._encode("assistant\n"),
        ]

    def choice(self, option: str) -> list[int]:
        """Return the ids of an option as a whole answer, its end included."""
        return [*self._encode(option), self.im_end]

    def finish(self, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, int, bool]:
        """Return the text of generated ids, how many of them count, and whether it has ended.

        It ends at an end mark, or in front of the first of the `stop` texts.
        """
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.decode(ids[:end])
        if not any(word in text for word in stop):
            return text.strip(), end, end < len(ids)
        length = next(  # tokens until a stop text is complete
            length
            for length in range(1, end + 1)
            if any(word in self.decode(ids[:length]) for word in stop)
        )
        text = self.decode(ids[:length])
        cut = min(text.index(word) for word in stop if word in text)
        return text[:cut].strip(), length, True

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def check_kept(kept: KeptTokens, width: int) -> None:
    """Raise BadTokensError, with the numbers, for kept tokens that this model cannot read."""
    if kept.embeds.ndim != 2 or kept.embeds.shape[1] != width:
        raise BadTokensError(
            f"kept tokens are {list(kept.embeds.shape)}, the model reads [n, {width}]"
        )
    if kept.embeds.shape[0] == 0:
        raise BadTokensError("there are no kept tokens")
    if kept.positions.shape != (3, kept.embeds.shape[0]):
        raise BadTokensError(
            f"positions are {list(kept.positions.shape)} for {kept.embeds.shape[0]} tokens"
        )


def check_room(
    *, next_position: int, num_after: int, max_new_tokens: int, max_positions: int
) -> None:
    """Raise TooLongError where prompt and answer would reach beyond the model's positions.

    `next_position` is where the `num_after` tokens behind the video begin.
    """
    end = next_position + num_after + max_new_tokens
    if end > max_positions:
        raise TooLongError(
            f"video, prompt and {max_new_tokens} answer tokens end at position {end}, "
            f"the model was made for {max_positions}"
        )


def prompt_positions(
    block: NDArray[np.integer], *, next_position: int, num_before: int, num_after: int
) -> NDArray[np.int64]:
    """Return the positions [3, L] of text, kept tokens, text.

    `block` [3, n] and `next_position` are relative to the block's start. Text before counts from
    0, the block keeps its gaps, text behind counts from `next_position`; so does the answer.
    """
    before = np.broadcast_to(np.arange(num_before), (3, num_before))
    after = np.broadcast_to(np.arange(num_after), (3, num_after)) + num_before + next_position
    return np.concatenate([before, block.astype(np.int64) + num_before, after], axis=1)
