"""Kept tokens + system prompt + user prompt -> text, with the tokens' true positions.

Shapes: L tokens of a context, S of a question, n kept tokens, V ids, D width.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omnisift.backbone import Backbone
from omnisift.compressor import KeptTokens
from omnisift.prompts import (
    PromptText,
    Sampling,
    check_kept,
    check_room,
    prompt_positions,
)
from omnisift.shared_contexts import Branch, SharedContexts

T = TypeVar("T")

_SIDE_BY_SIDE = 32  # questions or options of a video
_BRANCH_TOKENS = 2048  # of them together: the mask grows with their square
_STEPS_BETWEEN_LOOKS = 8


@dataclass(frozen=True)
class Answer:
    """The text of one prompt."""

    text: str
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str  # "stop", "length" when max_new_tokens ended it, "choice" when chosen


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

        A context is read once, whatever the number of its questions and their choices. Side by
        side are contexts that are asked about as much, since all are computed as the largest.
        """
        answers: dict[int, Answer] = {}
        for places in _alike(prompts):
            answers |= zip(places, self._ask([prompts[i] for i in places]), strict=True)
        return [answers[i] for i in range(len(prompts))]

    def _ask(self, prompts: Sequence[Prompt]) -> list[Answer]:
        contexts = list({id(prompt.context): prompt.context for prompt in prompts}.values())
        shared = SharedContexts(self.backbone, [(c.embeds, c.positions) for c in contexts])
        row_of = {id(context): row for row, context in enumerate(contexts)}
        branches = [
            Branch(row_of[id(prompt.context)], prompt.question, prompt.question_positions)
            for prompt in prompts
        ]
        free = [i for i, prompt in enumerate(prompts) if not prompt.choices]
        answers: dict[int, Answer] = {}
        lengths = [len(branches[i].embeds) for i in free]
        for asked in _rounds(free, [branches[i].context for i in free], lengths):
            outputs = self._generate(
                shared, [branches[i] for i in asked], [prompts[i].seed for i in asked]
            )
            for i, ids in zip(asked, outputs, strict=True):
                answers[i] = self._answer(len(prompts[i]), ids)
        options = [
            (i, self.text.choice(choice))
            for i, prompt in enumerate(prompts)
            for choice in prompt.choices
        ]
        lengths = [len(branches[i].embeds) + len(ids) for i, ids in options]
        scores: dict[int, list[float]] = {}
        for weighed in _rounds(options, [branches[i].context for i, _ in options], lengths):
            likely = self._weigh(shared, [(branches[i], ids) for i, ids in weighed])
            for (i, _), score in zip(weighed, likely, strict=True):
                scores.setdefault(i, []).append(score)
        for i, of_prompt in scores.items():
            answers[i] = self._chosen(prompts[i], of_prompt)
        return [answers[i] for i in range(len(prompts))]

    def _generate(
        self, shared: SharedContexts, branches: list[Branch], seeds: list[int]
    ) -> list[list[int]]:
        """Choose tokens one by one, each behind the last position, until all have ended."""
        hidden = shared.read(branches)[:, -1]
        ends = torch.tensor(self.text.ends, device=hidden.device)
        ended = torch.zeros(len(branches), dtype=torch.bool, device=hidden.device)
        next_token = _Chooser(self.sampling, seeds, hidden.device)
        chosen: list[Tensor] = []
        while True:
            token = next_token(self.backbone.model.lm_head(hidden))
            chosen.append(token)
            ended |= torch.isin(token, ends)
            # Looking waits for the device, so it is done now and then; what a branch says behind
            # its end is cut off.
            looks = len(chosen) % _STEPS_BETWEEN_LOOKS == 1
            if len(chosen) == self.max_new_tokens or (looks and self._all_ended(ended, chosen)):
                ids: list[list[int]] = torch.stack(chosen, dim=1).tolist()
                return ids
            hidden = shared.extend(self.backbone.embed(token))

    def _weigh(
        self, shared: SharedContexts, options: Sequence[tuple[Branch, list[int]]]
    ) -> list[float]:
        """Return how likely the ids of each option are behind its question, as logarithms."""
        pieces = []
        for (context, embeds, positions), ids in options:
            answer = self.backbone.embed(torch.tensor(ids[:-1]))
            behind = positions[:, -1:] + 1 + torch.arange(len(ids) - 1)
            pieces.append(
                Branch(context, torch.cat([embeds, answer]), torch.cat([positions, behind], dim=1))
            )
        hidden = shared.read(pieces)
        # Branches end together, so the last states of each foretell its option. One at a time,
        # since a vocabulary is wide.
        return [
            float(
                self.backbone.model.lm_head(states_SD[-len(ids) :])
                .float()
                .log_softmax(dim=-1)
                .gather(1, torch.tensor(ids, device=states_SD.device)[:, None])
                .sum()
            )
            for states_SD, (_, ids) in zip(hidden, options, strict=True)
        ]

    def _chosen(self, prompt: Prompt, scores: list[float]) -> Answer:
        choice = prompt.choices[scores.index(max(scores))]
        num_tokens = len(self.text.choice(choice)) - 1
        return Answer(choice, len(prompt), num_tokens, "choice")

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


def _alike(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Yield the places of prompts by contexts that are asked about as much.

    The most branches of one times the longest question of any is at most twice what each has.
    """
    of_context: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        of_context.setdefault(id(prompt.context), []).append(place)
    sized = [
        (
            min(_SIDE_BY_SIDE, sum(max(1, len(prompts[i].choices)) for i in places)),
            max(len(prompts[i].question) for i in places),
            places,
        )
        for places in of_context.values()
    ]
    group: list[tuple[int, int, list[int]]] = []
    for each in sorted(sized, key=lambda size: size[0] * size[1]):
        joint = [*group, each]
        most, longest = max(size[0] for size in joint), max(size[1] for size in joint)
        if most * longest > 2 * joint[0][0] * joint[0][1]:
            yield [i for size in group for i in size[2]]
            joint = [each]
        group = joint
    if group:
        yield [i for size in group for i in size[2]]


def _rounds(items: Sequence[T], context_of: Sequence[int], lengths: list[int]) -> Iterator[list[T]]:
    """Yield all items, as many of each context at a time as are read side by side."""
    rounds: dict[int, list[T]] = {}
    taken: Counter[int] = Counter()
    at_once = max(1, min(_SIDE_BY_SIDE, _BRANCH_TOKENS // max(lengths, default=1)))
    for item, context in zip(items, context_of, strict=True):
        rounds.setdefault(taken[context] // at_once, []).append(item)
        taken[context] += 1
    yield from rounds.values()


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
