"""Does vLLM say what transformers says? Positions, log-probabilities, greedy tokens, choices.

Shapes: L tokens of a prompt, V vocabulary, D width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from omnisift.answer import Answerer, Prompt
from omnisift.backbone import Backbone
from omnisift.checkpoint import load_backbone, load_tokenizer, thinker_config
from omnisift.compressor import KeptTokens
from omnisift.engines.interface import AskedVideo, Question
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions
from omnisift.prompts import Sampling

GREEDY_TOKENS = 32
SYSTEM_PROMPT = "You see and hear."
QUESTIONS = (
    Question("What is seen?"),
    Question("Wie klingt es, und warum?"),
    Question("Which of these?", ("yes", "no", "a dog barks", "a door closes", "nothing")),
    Question("How many?", ("1", "2", "3", "4")),
)
# Said, not measured: several comparisons may share a GPU.
_CACHE_BYTES = 1 << 30
PROBE = {"worker_extension_cls": "omnisift.measure.vllm_probe.Probe", "max_logprobs": -1}


@dataclass(frozen=True)
class Parity:
    """What was compared, and how it came out."""

    prompts: int
    exact_positions: int  # prompts whose positions in vLLM are all the reference's
    error: float  # of vLLM's log-probabilities from float32's, root mean square
    reference_error: float  # of transformers' at the same precision
    plain_error: float  # of vLLM's when the kept tokens lose their positions
    greedy_tokens: int  # compared: up to the first that rounding could turn
    wrong_tokens: int  # of these
    same_answers: int  # prompts with all greedy tokens equal, of those that are not choices
    same_choices: int
    choices: int

    @property
    def holds(self) -> bool:
        """Say whether the engines agree, and whether a lost position would have been seen."""
        return (
            self.exact_positions == self.prompts
            and self.wrong_tokens == 0
            and self.error < 1.5 * self.reference_error + 1e-4
            and self.plain_error > 5 * self.error
        )


def measure_parity(
    folder: Path,
    kept: Sequence[KeptTokens],
    *,
    device: str,
    eager: bool = True,
    tensor_parallel_size: int = 1,
) -> Parity:
    """Compare vLLM with transformers on a checkpoint; float32 says how far rounding goes.

    `eager` is vLLM without captured graphs, which starts sooner; `tensor_parallel_size` GPUs share
    its model.
    """
    backbone = load_backbone(folder, part="language_model", device=device)
    exact = Backbone(copy.deepcopy(backbone.model).float())
    tokenizer = load_tokenizer(folder)
    common: dict[str, Any] = {"system_prompt": SYSTEM_PROMPT, "max_new_tokens": GREEDY_TOKENS}
    reference, exactly = (Answerer(part, tokenizer, **common) for part in (backbone, exact))
    context_tokens = min(8192, thinker_config(folder).text_config.max_position_embeddings)
    options = VllmOptions(
        gpu_memory_fraction=0.1,
        tensor_parallel_size=tensor_parallel_size,
        context_tokens=context_tokens,
        batched_tokens=8192,
        eager=eager,
        more={**PROBE, "kv_cache_memory_bytes": _CACHE_BYTES},
    )
    vllm = VllmEngine(folder, sampling=Sampling(), options=options, device=device, **common)
    try:
        return _compare(vllm, reference, exactly, kept)
    finally:
        vllm.close()


def _compare(
    vllm: VllmEngine, reference: Answerer, exactly: Answerer, kept: Sequence[KeptTokens]
) -> Parity:
    from vllm import SamplingParams

    vocabulary = reference.backbone.model.config.text_config.vocab_size
    scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    greedy = SamplingParams(
        max_tokens=GREEDY_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False
    )
    vllm.call("watch_positions")
    squares: dict[str, list[Tensor]] = {"vllm": [], "reference": [], "plain": []}
    counts = dict.fromkeys(("exact", "tokens", "wrong", "same"), 0)
    free = [question for question in QUESTIONS if not question.choices]
    for number, tokens in enumerate(kept):
        for question in free:
            video = AskedVideo(f"video {number}", tokens, [question])
            prompt = reference.ask(reference.open(tokens), question.text)
            right = _logprobs(exactly, tokens, question)
            vllm.call("take_positions")
            [output] = vllm.outputs([video], scored)
            counts["exact"] += _same_positions(vllm.call("take_positions")[0], prompt)
            plain = AskedVideo(f"plain {number}", _without_positions(tokens), [question])
            [misplaced] = vllm.outputs([plain], scored)
            near = _logprobs(reference, tokens, question)
            squares["vllm"].append((_found(output, vocabulary) - right) ** 2)
            squares["reference"].append((near - right) ** 2)
            squares["plain"].append((_found(misplaced, vocabulary) - right) ** 2)
            rounding = 2 * float((near - right).abs().max())
            ids, gaps = _greedy(reference.backbone, prompt)
            [said] = vllm.outputs([video], greedy)[0].outputs
            length = next((i for i, gap in enumerate(gaps) if gap <= rounding), len(ids))
            pairs = list(zip(ids[:length], said.token_ids, strict=False))
            counts["tokens"] += length
            counts["wrong"] += sum(ours != theirs for ours, theirs in pairs)
            counts["same"] += ids == list(said.token_ids)
    choosing = [question for question in QUESTIONS if question.choices]
    videos = [AskedVideo(f"video {i}", tokens, choosing) for i, tokens in enumerate(kept)]
    chosen = [answer for answers in vllm(videos) for answer in answers]
    expected = reference(
        [
            reference.ask(context, question.text, choices=question.choices)
            for context in map(reference.open, kept)
            for question in choosing
        ]
    )
    errors = {name: float(torch.cat(found).mean().sqrt()) for name, found in squares.items()}
    return Parity(
        prompts=len(kept) * len(free),
        exact_positions=counts["exact"],
        error=errors["vllm"],
        reference_error=errors["reference"],
        plain_error=errors["plain"],
        greedy_tokens=counts["tokens"],
        wrong_tokens=counts["wrong"],
        same_answers=counts["same"],
        same_choices=sum(a == b for a, b in zip(chosen, expected, strict=True)),
        choices=len(expected),
    )


def _without_positions(kept: KeptTokens) -> KeptTokens:
    """Return the tokens as plain text would stand: one position each, without gaps."""
    num_tokens = kept.embeds.shape[0]
    plain = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), (3, num_tokens)).copy()
    return replace(kept, positions=plain, next_position=num_tokens)


def _whole(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Return embeddings [L, D] and positions [3, L] of a prompt in one piece."""
    return (
        torch.cat([prompt.context.embeds, prompt.question]),
        torch.cat([prompt.context.positions, prompt.question_positions], dim=1),
    )


def _same_positions(steps: list[list[list[int]]], prompt: Prompt) -> bool:
    """Say whether the steps of one prompt, laid end to end, began with its positions [3, L]."""
    _, positions = _whole(prompt)
    seen = torch.cat([torch.tensor(step) for step in steps], dim=1)
    return torch.equal(seen[:, : positions.shape[1]], positions)


@torch.inference_mode()
def _logprobs(answerer: Answerer, kept: KeptTokens, question: Question) -> Tensor:
    """Return the log-probabilities [L - 1, V] of what follows each token but the last."""
    embeds, positions = _whole(answerer.ask(answerer.open(kept), question.text))
    backbone = answerer.backbone
    cache = DynamicCache(config=backbone.model.config.text_config)
    hidden = backbone.forward_text(
        embeds[None], None, positions[:, None].to(backbone.device), cache
    )
    logits: Tensor = backbone.model.lm_head(hidden[0, :-1])
    return logits.float().log_softmax(dim=-1).cpu()


def _found(output: Any, vocabulary: int) -> Tensor:
    """Return vLLM's log-probabilities of a prompt in the same shape."""
    return torch.tensor(
        [
            [of_token[token].logprob for token in range(vocabulary)]
            for of_token in output.prompt_logprobs[1:]
        ]
    )


@torch.inference_mode()
def _greedy(backbone: Backbone, prompt: Prompt) -> tuple[list[int], list[float]]:
    """Return the likeliest tokens one by one, and how far each is ahead of the next likeliest."""
    embeds, positions = _whole(prompt)
    embeds, positions = embeds[None], positions[:, None].to(backbone.device)
    cache = DynamicCache(config=backbone.model.config.text_config)
    ids, gaps = [], []
    for _ in range(GREEDY_TOKENS):
        hidden = backbone.forward_text(embeds, None, positions, cache)
        logits = backbone.model.lm_head(hidden[0, -1]).float()
        best = logits.topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        embeds = backbone.embed(best.indices[:1])[None]
        positions = positions[:, :, -1:] + 1
    return ids, gaps
