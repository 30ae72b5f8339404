"""The LLM over kept tokens, and questions about them, against transformers' own way."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from omnisift.backbone import Backbone, language_model
from omnisift.measure.table import Sizes, line, relative_error
from omnisift.measure.timing import alternately
from omnisift.shared_contexts import Branch, SharedContexts

QUESTION_TOKENS = 24


class Llms(NamedTuple):
    """The same LLM twice."""

    ours: Backbone
    stock: Any  # a copy: our prefill compiles parts of the model where they are

    def tokens(self, number: int) -> Tensor:
        """Return random embeddings [L, D]."""
        width = self.stock.config.text_config.hidden_size
        return torch.randn(number, width, device=self.stock.device, dtype=self.stock.dtype)


@torch.inference_mode()
def measure_prefill(llms: Llms, sizes: Sizes) -> Iterator[str]:
    """Yield the LLM over the kept tokens against stock, and against no compression."""
    backbone = llms.ours
    device, config = backbone.device, backbone.model.config.text_config

    def inputs(num_tokens: int) -> tuple[Tensor, Tensor]:
        return llms.tokens(num_tokens)[None], torch.arange(num_tokens, device=device).expand(
            3, 1, -1
        )

    def ours(inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Prefill as Answerer does: the vocabulary only behind the last token."""
        embeds, positions = inputs
        hidden = backbone.forward_text(embeds, None, positions, DynamicCache(config=config))
        last: Tensor = backbone.model.lm_head(hidden[:, -1])
        return last

    kept, full = inputs(sizes.kept_tokens), inputs(4 * sizes.kept_tokens)

    def stock(model: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
        embeds, positions = inputs
        output = model(inputs_embeds=embeds, position_ids=positions, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits

    # Both round to 16 bits in their own order; float32 says which of them is nearer.
    short = kept[0][:, : sizes.kept_tokens // 4], kept[1][:, :, : sizes.kept_tokens // 4]
    exact = copy.deepcopy(llms.stock).float()
    right = stock(exact, (short[0].float(), short[1]))
    del exact
    errors = relative_error(ours(short), right), relative_error(stock(llms.stock, short), right)
    difference = relative_error(ours(kept), stock(llms.stock, kept))
    times = alternately(
        {
            "ours": lambda: ours(kept),
            "stock": lambda: stock(llms.stock, kept),
            "full": lambda: ours(full),
        },
        device,
        max(2, sizes.rounds // 4),
    )
    note = f"from stock {difference:.1e}; from float32 {errors[0]:.1e}, stock {errors[1]:.1e}"
    part = f"prefill, {sizes.kept_tokens:,} kept tokens"
    yield line(part, times["ours"], times["stock"], note)
    yield line(part, times["ours"], times["full"], f"against all {4 * sizes.kept_tokens:,}")


@torch.inference_mode()
def measure_questions(llms: Llms, sizes: Sizes) -> Iterator[str]:
    """Yield questions about one video against reading the video again for each."""
    backbone, device = llms.ours, llms.ours.device
    head = backbone.model.lm_head
    context = llms.tokens(sizes.kept_tokens)
    positions = torch.arange(sizes.kept_tokens + QUESTION_TOKENS).expand(3, -1)
    before, behind = positions.split([sizes.kept_tokens, QUESTION_TOKENS], dim=1)
    questions = [llms.tokens(QUESTION_TOKENS) for _ in range(sizes.questions)]

    def ours(number: int) -> Tensor:
        """Return the ids [number, T] of answers, as Answerer chooses them."""
        shared = SharedContexts(backbone, [(context, before)])
        hidden = shared.read([Branch(0, question, behind) for question in questions[:number]])
        chosen = [head(hidden[:, -1]).argmax(-1)]
        while len(chosen) < sizes.answer_tokens:
            chosen.append(head(shared.extend(backbone.embed(chosen[-1]))).argmax(-1))
        return torch.stack(chosen, dim=1)

    def stock(number: int) -> Tensor:
        """Return the same of transformers' layers, each question from the video's beginning."""
        llm, embed = language_model(llms.stock), llms.stock.get_input_embeddings()
        answers = []
        for question in questions[:number]:
            embeds, places = torch.cat([context, question])[None], positions[:, None].to(device)
            past: Any = None
            chosen: list[Tensor] = []
            while len(chosen) < sizes.answer_tokens:
                output = llm(
                    inputs_embeds=embeds, position_ids=places, past_key_values=past, use_cache=True
                )
                past, places = output.past_key_values, places[:, :, -1:] + 1
                last = llms.stock.lm_head(output.last_hidden_state[:, -1])
                chosen.append(last.argmax(-1))
                embeds = embed(chosen[-1])[:, None]
            answers.append(torch.cat(chosen))
        return torch.stack(answers)

    alike = float((ours(sizes.questions) == stock(sizes.questions)).double().mean())
    times = alternately(
        {
            "one": lambda: ours(1),
            "all": lambda: ours(sizes.questions),
            "stock": lambda: stock(sizes.questions),
        },
        device,
        max(2, sizes.rounds // 4),
    )
    part = f"{sizes.questions} questions about {sizes.kept_tokens:,} tokens"
    note = f"{sizes.answer_tokens} tokens each, {alike:.1%} of them alike"
    yield line(part, times["all"], times["stock"], note)
    further = (times["all"].median_ms - times["one"].median_ms) / (sizes.questions - 1)
    again = times["stock"].median_ms / sizes.questions
    yield (f"| a further question | {further:.2f} ms | {again:.2f} ms | {again / further:.1f}x | |")
