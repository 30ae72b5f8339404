"""Kept tokens + system prompt + user prompt -> text, with the tokens' true positions.

Shapes: B requests, L tokens of a prompt (left-padded), n kept tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from omnisift.backbone import Backbone
from omnisift.compressor import KeptTokens, TooLongError

_STEPS_BETWEEN_LOOKS = 8

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Answer:
    """The text of one prompt."""

    text: str
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str  # "stop", or "length" when max_new_tokens ended it


class _Batch(NamedTuple):
    """Sequences of unequal length side by side."""

    embeds: Tensor  # [B, L, D]
    mask: Tensor  # [B, L]
    positions: Tensor  # [3, B, L]


@dataclass(frozen=True, eq=False)
class Context:
    """What all prompts of a video begin with: the system turn, then its kept tokens."""

    embeds: Tensor  # [L, D]
    positions: Tensor  # [3, L]
    next_position: int  # where the question continues


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question about a video. Prompts that hold the same context share its prefill."""

    context: Context
    question: Tensor  # [S, D]
    question_positions: Tensor  # [3, S]

    def __len__(self) -> int:
        """Return the number of tokens, context included."""
        return self.context.embeds.shape[0] + self.question.shape[0]


class Answerer:
    """Answer prompts from kept tokens, greedily, with transformers: the reference engine."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str,
        max_new_tokens: int,
    ) -> None:
        """Take the LLM of `backbone`; its towers are not needed."""
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        vocabulary = tokenizer.get_vocab()
        missing = [mark for mark in (IM_START, IM_END, END_OF_TEXT) if mark not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}")
        self._im_start, self._im_end = vocabulary[IM_START], vocabulary[IM_END]
        self._end_of_text = vocabulary[END_OF_TEXT]
        # The published chat template: a system turn, then a user turn that opens with the video.
        self._prefix_ids = [
            *self._turn("system", system_prompt),
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

    def _turn(self, role: str, text: str) -> list[int]:
        return [self._im_start, *self._encode(f"{role}\n{text}"), self._im_end]

    def open(self, kept: KeptTokens) -> Context:
        """Place the kept tokens behind the system turn, positions intact.

        Raises ValueError for tokens of another width or with other positions than tokens.
        """
        if kept.embeds.ndim != 2 or kept.embeds.shape[1] != self.backbone.width:
            raise ValueError(
                f"kept tokens are {list(kept.embeds.shape)}, the model reads "
                f"[n, {self.backbone.width}]"
            )
        if kept.positions.shape != (3, kept.embeds.shape[0]):
            raise ValueError(
                f"positions are {list(kept.positions.shape)} for {kept.embeds.shape[0]} tokens"
            )
        text = self.backbone.embed(torch.tensor(self._prefix_ids))
        start = len(self._prefix_ids)
        block = torch.from_numpy(kept.positions.astype(np.int64)) + start
        return Context(
            embeds=torch.cat([text, kept.embeds.to(text.device, text.dtype)]),
            positions=torch.cat([torch.arange(start).expand(3, -1), block], dim=1),
            next_position=start + kept.next_position,
        )

    def ask(self, context: Context, question: str) -> Prompt:
        """Put a question behind a context.

        Raises TooLongError where prompt and answer would reach beyond the model's positions.
        """
        ids = [
            *self._encode(question),
            self._im_end,
            *self._encode("\n"),
            self._im_start,
            *self._encode("assistant\n"),
        ]
        end = context.next_position + len(ids) + self.max_new_tokens
        if end > self.backbone.max_positions:
            raise TooLongError(
                f"video, prompt and {self.max_new_tokens} answer tokens end at position {end}, "
                f"the model was made for {self.backbone.max_positions}"
            )
        positions = torch.arange(len(ids)) + context.next_position
        return Prompt(context, self.backbone.embed(torch.tensor(ids)), positions.expand(3, -1))

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a batch; the greedy text of each is what it would be alone.

        A context is prefilled once, whatever the number of its questions.
        """
        contexts = list({id(prompt.context): prompt.context for prompt in prompts}.values())
        place = {id(context): row for row, context in enumerate(contexts)}
        row_of_prompt = [place[id(prompt.context)] for prompt in prompts]
        prefill = self._pad([(context.embeds, context.positions) for context in contexts])
        cache = DynamicCache(config=self.backbone.model.config.text_config)
        self.backbone.forward_text(*prefill, cache)
        mask = prefill.mask
        if row_of_prompt != list(range(len(contexts))):
            rows = torch.tensor(row_of_prompt, device=mask.device)
            cache.batch_select_indices(rows)
            mask = mask[rows]
        questions = self._pad([(prompt.question, prompt.question_positions) for prompt in prompts])
        mask = torch.cat([mask, questions.mask], dim=1)
        outputs = self._decode(questions.embeds, mask, questions.positions, cache)
        return [
            self._answer(len(prompt), ids) for prompt, ids in zip(prompts, outputs, strict=True)
        ]

    def _pad(self, sequences: Sequence[tuple[Tensor, Tensor]]) -> _Batch:
        """Put embeddings [L, D] and positions [3, L] side by side, padded on the left.

        So the next token of every row belongs into the same column.
        """
        device = self.backbone.device
        shape = (len(sequences), max(embeds.shape[0] for embeds, _ in sequences))
        embeds_BLD = torch.zeros(
            *shape, self.backbone.width, device=device, dtype=self.backbone.dtype
        )
        mask_BL = torch.zeros(shape, dtype=torch.long, device=device)
        positions_3BL = torch.zeros((3, *shape), dtype=torch.long, device=device)
        for row, (embeds, positions) in enumerate(sequences):
            start = shape[1] - embeds.shape[0]
            embeds_BLD[row, start:] = embeds
            mask_BL[row, start:] = 1
            positions_3BL[:, row, start:] = positions.to(device)
        return _Batch(embeds_BLD, mask_BL, positions_3BL)

    def _decode(
        self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
    ) -> list[list[int]]:
        """Choose the likeliest tokens, each behind the last position, until all rows have ended."""
        ends = torch.tensor([self._im_end, self._end_of_text], device=mask.device)
        chosen: list[Tensor] = []
        ended = torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)
        for step in range(self.max_new_tokens):
            hidden = self.backbone.forward_text(embeds, mask, positions, cache)
            token = self.backbone.model.lm_head(hidden[:, -1]).argmax(dim=-1)
            chosen.append(token)
            ended |= torch.isin(token, ends)
            # Looking waits for the device, so it is done now and then; what a row says behind
            # its end is cut off.
            if step % _STEPS_BETWEEN_LOOKS == 0 and bool(ended.all()):
                break
            embeds = self.backbone.embed(token)[:, None]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, :, -1:] + 1
        ids: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        return ids

    def _answer(self, num_prompt_tokens: int, ids: list[int]) -> Answer:
        ends = [i for i, token in enumerate(ids) if token in (self._im_end, self._end_of_text)]
        length = ends[0] if ends else len(ids)
        return Answer(
            text=str(self.tokenizer.decode(ids[:length], skip_special_tokens=True)).strip(),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=length,
            finish_reason="stop" if ends else "length",
        )
