"""Kept tokens + system prompt + user prompt -> text, with the tokens' true positions.

Shapes: B requests, L tokens of a prompt (left-padded), n kept tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omnisift.backbone import Backbone
from omnisift.compressor import KeptTokens, TooLongError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Answer:
    """The text of one prompt."""

    text: str
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str  # "stop", or "length" when max_new_tokens ended it


@dataclass(frozen=True)
class Prompt:
    """A whole prompt, ready for the LLM."""

    embeds: Tensor  # [L, D]
    positions: Tensor  # [3, L]


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

    def build_prompt(self, kept: KeptTokens, question: str) -> Prompt:
        """Place the kept tokens between system turn and question, positions intact.

        Raises ValueError for tokens of another width, TooLongError where prompt and answer
        would reach beyond the model's positions.
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
        suffix_ids = [
            *self._encode(question),
            self._im_end,
            *self._encode("\n"),
            self._im_start,
            *self._encode("assistant\n"),
        ]
        start = len(self._prefix_ids)
        resume = start + kept.next_position
        end = resume + len(suffix_ids) + self.max_new_tokens
        if end > self.backbone.max_positions:
            raise TooLongError(
                f"video, prompt and {self.max_new_tokens} answer tokens end at position {end}, "
                f"the model was made for {self.backbone.max_positions}"
            )
        text = self.backbone.embed(torch.tensor(self._prefix_ids + suffix_ids))
        tokens = kept.embeds.to(text.device, text.dtype)
        positions = np.concatenate(
            [
                np.broadcast_to(np.arange(start), (3, start)),
                kept.positions.astype(np.int64) + start,
                np.broadcast_to(np.arange(len(suffix_ids)) + resume, (3, len(suffix_ids))),
            ],
            axis=1,
        )
        return Prompt(
            embeds=torch.cat([text[:start], tokens, text[start:]]),
            positions=torch.from_numpy(positions),
        )

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a batch; the greedy text of each is what it would be alone."""
        lengths = [prompt.embeds.shape[0] for prompt in prompts]
        longest = max(lengths)
        device = self.backbone.device
        shape = (len(prompts), longest)
        embeds = torch.zeros(*shape, self.backbone.width, device=device, dtype=self.backbone.dtype)
        mask = torch.zeros(shape, dtype=torch.long, device=device)
        positions = torch.zeros((3, *shape), dtype=torch.long, device=device)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            # Padding on the left: every answer then starts in the same column.
            embeds[row, longest - length :] = prompt.embeds
            mask[row, longest - length :] = 1
            positions[:, row, longest - length :] = prompt.positions.to(device)
        output = self.backbone.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,  # without them transformers would use 0..L-1, silently
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=[self._im_end, self._end_of_text],
            pad_token_id=self._end_of_text,
        )
        return [
            self._answer(length, ids) for length, ids in zip(lengths, output.tolist(), strict=True)
        ]

    def _answer(self, num_prompt_tokens: int, ids: list[int]) -> Answer:
        ends = [i for i, token in enumerate(ids) if token in (self._im_end, self._end_of_text)]
        length = ends[0] if ends else len(ids)
        return Answer(
            text=str(self.tokenizer.decode(ids[:length], skip_special_tokens=True)).strip(),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=length,
            finish_reason="stop" if ends else "length",
        )
