"""Kept tokens + system prompt + user prompt -> text, with the tokens' true positions.

Shapes: B requests, L tokens of a prompt (left-padded), n kept tokens, D width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from omnisift.backbone import Backbone
from omnisift.compressor import KeptTokens
from omnisift.prompts import (
    PromptText,
    Sampling,
    check_kept,
    check_room,
    prompt_positions,
)

_STEPS_BETWEEN_LOOKS = 8


@dataclass(frozen=True)
class Answer:
    """The text of one prompt."""

    text: str
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str  # "stop", "length" when max_new_tokens ended it, "choice" when chosen


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
    choices: tuple[str, ...] = ()  # the answer is the likeliest of these; empty: free text
    seed: int = 0  # of this prompt's own sampling

    def __len__(self) -> int:
        """Return the number of tokens, context included."""
        return self.context.embeds.shape[0] + self.question.shape[0]


class Answerer:
    """Answer prompts from kept tokens with transformers: the reference engine."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        """Take the LLM of `backbone`; its towers are not needed."""
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        if self.sampling.json_schema:
            raise ValueError("answers of a JSON schema need vLLM")
        self.text = PromptText(tokenizer, system_prompt)

    def open(self, kept: KeptTokens) -> Context:
        """Place the kept tokens behind the system turn, positions intact.

        Raises BadTokensError for tokens of another width or with other positions than tokens.
        """
        check_kept(kept, self.backbone.width)
        text = self.backbone.embed(torch.tensor(self.text.before_video))
        positions = prompt_positions(
            kept.positions,
            next_position=kept.next_position,
            num_before=text.shape[0],
            num_after=0,
        )
        return Context(
            embeds=torch.cat([text, kept.embeds.to(text.device, text.dtype)]),
            positions=torch.from_numpy(positions),
            next_position=text.shape[0] + kept.next_position,
        )

    def ask(
        self, context: Context, question: str, *, choices: Sequence[str] = (), seed: int = 0
    ) -> Prompt:
        """Put a question behind a context.

        Raises TooLongError where prompt and answer would reach beyond the model's positions.
        """
        ids = self.text.after_video(question)
        check_room(
            next_position=context.next_position,
            num_after=len(ids),
            max_new_tokens=self._longest_answer(choices),
            max_positions=self.backbone.max_positions,
        )
        positions = torch.arange(len(ids)) + context.next_position
        return Prompt(
            context,
            self.backbone.embed(torch.tensor(ids)),
            positions.expand(3, -1),
            choices=tuple(choices),
            seed=seed,
        )

    def _longest_answer(self, choices: Sequence[str]) -> int:
        return max((len(self.text.choice(c)) for c in choices), default=self.max_new_tokens)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer a batch; the answer to each is what it would be alone.

        A context is prefilled once, whatever the number of its questions and their choices.
        """
        contexts = list({id(prompt.context): prompt.context for prompt in prompts}.values())
        place = {id(context): row for row, context in enumerate(contexts)}
        cache, mask = self._prefill(contexts)
        answers: list[Answer | None] = [None] * len(prompts)
        for choosing in (True, False):
            asked = [i for i, prompt in enumerate(prompts) if bool(prompt.choices) == choosing]
            if not asked:
                continue
            others = choosing and len(asked) < len(prompts)  # who still need the prefill
            given = (self._choose if choosing else self._generate)(
                [prompts[i] for i in asked],
                [place[id(prompts[i].context)] for i in asked],
                mask,
                copy.deepcopy(cache) if others else cache,
            )
            for i, answer in zip(asked, given, strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _prefill(self, contexts: Sequence[Context]) -> tuple[DynamicCache, Tensor]:
        """Return the contexts' keys and values, and which of them are real [B, L].

        Contexts of one length are read together and no padding is computed; it only stands in
        front of the shorter ones' keys behind it.
        """
        config = self.backbone.model.config.text_config
        by_length: dict[int, list[int]] = {}
        for row, context in enumerate(contexts):
            by_length.setdefault(context.embeds.shape[0], []).append(row)
        longest = max(by_length)
        read = []
        for rows in by_length.values():
            cache = DynamicCache(config=config)
            equal = self._pad([(contexts[r].embeds, contexts[r].positions) for r in rows])
            self.backbone.forward_text(*equal, cache)
            read.append(cache)
        lengths = torch.tensor([len(context.embeds) for context in contexts])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long().to(self.backbone.device)
        if len(read) == 1:
            return read[0], mask
        order = torch.tensor([row for rows in by_length.values() for row in rows])
        joined = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            layers: list[Any] = [cache.layers[index] for cache in read]
            keys, values = (
                torch.cat([_padded(getattr(layer, name), longest) for layer in layers])
                for name in ("keys", "values")
            )
            joined.update(keys, values, index)
            for layer in layers:  # so that a layer is there twice, and not the whole
                layer.keys = layer.values = None
        joined.batch_select_indices(order.argsort().to(self.backbone.device))
        return joined, mask

    def _generate(
        self, prompts: Sequence[Prompt], context_of: list[int], mask: Tensor, cache: DynamicCache
    ) -> list[Answer]:
        mask = _select(cache, mask, context_of)
        questions = self._pad([(prompt.question, prompt.question_positions) for prompt in prompts])
        mask = torch.cat([mask, questions.mask], dim=1)
        seeds = [prompt.seed for prompt in prompts]
        outputs = self._decode(questions.embeds, mask, questions.positions, cache, seeds)
        return [
            self._answer(len(prompt), ids) for prompt, ids in zip(prompts, outputs, strict=True)
        ]

    def _choose(
        self, prompts: Sequence[Prompt], context_of: list[int], mask: Tensor, cache: DynamicCache
    ) -> list[Answer]:
        """Return the option of each prompt whose tokens, the end included, are likeliest."""
        options = [
            (prompt, row, self.text.choice(choice))
            for prompt, row in zip(prompts, context_of, strict=True)
            for choice in prompt.choices
        ]
        mask = _select(cache, mask, [row for _, row, _ in options])
        pieces = []
        for prompt, _, ids in options:
            positions = prompt.question_positions[:, -1:] + 1 + torch.arange(len(ids) - 1)
            pieces.append(
                (
                    torch.cat([prompt.question, self.backbone.embed(torch.tensor(ids[:-1]))]),
                    torch.cat([prompt.question_positions, positions], dim=1),
                )
            )
        padded = self._pad(pieces)
        mask = torch.cat([mask, padded.mask], dim=1)
        hidden = self.backbone.forward_text(padded.embeds, mask, padded.positions, cache)
        scores = iter(
            [
                # Padded on the left: a token's likelihood stands in front of it, the last ids
                # of all rows at the end. One row at a time, since a vocabulary is wide.
                float(
                    self.backbone.model.lm_head(row_LD[-len(ids) :])
                    .float()
                    .log_softmax(dim=-1)
                    .gather(1, torch.tensor(ids, device=row_LD.device)[:, None])
                    .sum()
                )
                for row_LD, (_, _, ids) in zip(hidden, options, strict=True)
            ]
        )
        return [self._chosen(prompt, [next(scores) for _ in prompt.choices]) for prompt in prompts]

    def _chosen(self, prompt: Prompt, scores: list[float]) -> Answer:
        choice = prompt.choices[scores.index(max(scores))]
        num_tokens = len(self.text.choice(choice)) - 1
        return Answer(choice, len(prompt), num_tokens, "choice")

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
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache,
        seeds: list[int],
    ) -> list[list[int]]:
        """Choose tokens one by one, each behind the last position, until all rows have ended."""
        ends = torch.tensor(self.text.ends, device=mask.device)
        next_token = _Chooser(self.sampling, seeds, mask.device)
        chosen: list[Tensor] = []
        ended = torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)
        for step in range(self.max_new_tokens):
            hidden = self.backbone.forward_text(embeds, mask, positions, cache)
            token = next_token(self.backbone.model.lm_head(hidden[:, -1]))
            chosen.append(token)
            ended |= torch.isin(token, ends)
            # Looking waits for the device, so it is done now and then; what a row says behind
            # its end is cut off.
            if step % _STEPS_BETWEEN_LOOKS == 0 and self._all_ended(ended, chosen):
                break
            embeds = self.backbone.embed(token)[:, None]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, :, -1:] + 1
        ids: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        return ids

    def _all_ended(self, ended: Tensor, chosen: list[Tensor]) -> bool:
        if not self.sampling.stop:
            return bool(ended.all())
        rows: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        return all(
            done or self.text.finish(ids, self.sampling.stop)[2]
            for done, ids in zip(ended.tolist(), rows, strict=True)
        )

    def _answer(self, num_prompt_tokens: int, ids: list[int]) -> Answer:
        text, length, ended = self.text.finish(ids, self.sampling.stop)
        return Answer(text, num_prompt_tokens, length, "stop" if ended else "length")


def _padded(states_BHLd: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(states_BHLd, (0, 0, length - states_BHLd.shape[2], 0))


def _select(cache: DynamicCache, mask: Tensor, rows: list[int]) -> Tensor:
    """Give `cache` one row for each of `rows`; return their mask."""
    if rows == list(range(mask.shape[0])):
        return mask
    index = torch.tensor(rows, device=mask.device)
    cache.batch_select_indices(index)
    return mask[index]


class _Chooser:
    """Choose the next token of each row, by rows' own seeds where anything is left to chance."""

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        if self._sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probs, token = (
            (logits_BV.float() / self._sampling.temperature)
            .softmax(-1)
            .sort(dim=-1, descending=True)
        )
        # What the likelier ones have left of top_p decides, so that the likeliest always stays.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= self._sampling.top_p, 0.0)
        picks = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probs, self._generators, strict=True)
        ]
        return token.gather(1, torch.stack(picks)).squeeze(1)
