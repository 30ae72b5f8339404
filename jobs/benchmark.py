"""Measure the parts against what one would run otherwise: `python jobs/benchmark.py`.

The whole table needs a GPU with 80 GB and uses the published sizes of Qwen2.5-Omni-7B with random
weights, on which time does not depend. `--small` takes the sizes of the small model that ships and
runs on a CPU. `--quick` runs the same code on any machine with a tiny model, in seconds: it shows
that the benchmark works, not how fast anything is.
"""

import argparse
import copy
import gc
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.checkpoint import thinker_config
from omnisift.compress import Compressed, compress_batch, drop_shares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.layout import Block, place_block
from omnisift.measure.chunk_loop import chunk_loop
from omnisift.measure.random_model import published_config, random_model
from omnisift.measure.timing import Times, alternately, behind_other_work, settle
from omnisift.media import FACTOR, SAMPLE_RATE
from omnisift.mini.shipped import FOLDER
from omnisift.mini.tiny import tiny_config
from omnisift.shared_contexts import Branch, SharedContexts

PARTS = ("compression", "towers", "prefill", "questions")
RETAIN = 0.25
QUESTION_TOKENS = 24


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


def report(part: str, ours: Times, other: Times | None, note: str = "") -> None:
    """Print one line of the table."""
    against = "" if other is None else f"{other}"
    factor = "" if other is None else f"{other.median_ms / ours.median_ms:.2f}x"
    print(f"| {part} | {ours} | {against} | {factor} | {note} |", flush=True)


def _block(backbone: Backbone, grids: int, side: int) -> Block:
    return place_block(
        backbone.layout,
        grids=grids,
        height=side,
        width=side,
        seconds_per_grid=1.0,
        audio_tokens=grids * backbone.layout.positions_per_second,
    )


@contextmanager
def _no_waiting(device: torch.device) -> Iterator[None]:
    """Turn every wait of the host for the GPU into an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def measure_compression(backbone: Backbone, sizes: Sizes) -> None:
    """Measure compression against the loop, and the cost of one more chunk."""
    device, layout = backbone.device, backbone.layout
    torch.manual_seed(1)
    selector = AudioSelector(backbone.width).to(device).requires_grad_(False)
    shares = drop_shares(RETAIN)
    costs: list[tuple[int, Times, Times]] = []
    for chunks in sorted({*sizes.chunks, sizes.grids // 2}):
        block = _block(backbone, 2 * chunks, sizes.side)
        ids, positions = torch.from_numpy(block.ids), torch.from_numpy(block.positions)
        embeds = torch.randn(len(ids), backbone.width, device=device, dtype=backbone.dtype)
        on_device = (embeds, ids.to(device), positions.to(device))

        def ours(
            sequence: tuple[Tensor, Tensor, Tensor] = (embeds, ids, positions),
        ) -> Compressed:
            [result] = compress_batch([sequence], shares, layout, selector=selector)
            return result

        def loop(sequence: tuple[Tensor, Tensor, Tensor] = on_device) -> Tensor:
            return chunk_loop(*sequence, shares, layout, selector=selector)

        same = float((ours().keep_mask == loop()).double().mean())
        with _no_waiting(device):
            ours()
        rounds = max(2, sizes.rounds // 4)
        times = alternately({"ours": ours, "loop": loop}, device, rounds)
        queued = behind_other_work(ours, device, sizes.rounds)
        costs.append((chunks, queued, times["loop"]))
        part = f"compression, {len(ids):,} tokens"
        note = f"{chunks} chunks of {2 * sizes.side**2}; {same:.4%} of decisions alike"
        report(f"{part}: behind the towers", queued, times["loop"], note)
        report(f"{part}: alone, with its plan", times["ours"], times["loop"])
    (few, ours_few, loop_few), (many, ours_many, loop_many) = costs[0], costs[-1]
    for name, low, high in (("ours", ours_few, ours_many), ("loop", loop_few, loop_many)):
        added = (high.median_ms - low.median_ms) / (many - few)
        print(f"| one more chunk, {few} to {many}: {name} | {added:.4f} ms | | | |")


def _clip(sizes: Sizes, seed: int) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    size = (2 * sizes.grids, sizes.side * FACTOR, sizes.side * FACTOR, 3)
    return Clip(
        frames=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        audio=torch.randn(sizes.grids * SAMPLE_RATE, generator=generator) * 0.1,
        fps=2.0,
    )


def measure_towers(model: Any, sizes: Sizes) -> None:
    """Measure the packed towers against the stock ones, then a whole video and its memory."""
    stock, packed = Backbone(model, towers="stock"), Backbone(model)
    # Both round to 16 bits in their own order; float32 says which of them is nearer.
    exact = Backbone(copy.deepcopy(model).float(), towers="stock")
    device = stock.device
    clips = [_clip(sizes, seed) for seed in range(4)]
    rounds = max(2, sizes.rounds // 4)
    frames, audio = [clips[0].frames], [clips[0].audio]
    # Before the first packed run: packing lends the stock modules its better aligned weights.
    alone = alternately(
        {
            "video": lambda: stock.encode_video(frames),
            "audio": lambda: stock.encode_audio(audio),
        },
        device,
        rounds,
    )
    for kind, media in (("video", frames), ("audio", audio)):
        encode = "encode_" + kind
        [wanted] = getattr(stock, encode)(media)
        settle(device)
        start = time.perf_counter()
        [actual] = getattr(packed, encode)(media)
        settle(device)
        seconds = time.perf_counter() - start
        short = [media[0][: max(2, len(media[0]) // 16)]]
        [right] = getattr(exact, encode)(short)
        errors = [
            relative_error(getattr(tower, encode)(short)[0], right) for tower in (packed, stock)
        ]
        note = (
            f"from stock {relative_error(actual, wanted):.1e}; from float32 {errors[0]:.1e}, "
            f"stock {errors[1]:.1e}; first call {seconds:.0f} s"
        )
        call = alternately({kind: partial(getattr(packed, encode), media)}, device, rounds)
        report(f"{kind} tower, {sizes.grids} s", call[kind], alone[kind], note)
    several = alternately(
        {"four": lambda: packed.encode_video([clip.frames for clip in clips])}, device, rounds
    )
    report("vision tower, 4 videos in one call", several["four"], None)
    _measure_whole(packed, clips, rounds)


def _measure_whole(backbone: Backbone, clips: list[Clip], rounds: int) -> None:
    selector = AudioSelector(backbone.width).requires_grad_(requires_grad=False)
    compressor = VideoCompressor(backbone, selector, drop_shares(RETAIN))
    whole = alternately({"one": lambda: compressor(clips[:1])}, backbone.device, rounds)
    report("frames and sound to kept tokens", whole["one"], None)
    with _no_waiting(backbone.device):
        pending = compressor.start(clips[:1])
    pending.result()
    if backbone.device.type == "cuda":
        for gibibytes in (2, 3, 6):
            _measure_memory(backbone, selector, clips, gibibytes << 30)


def _measure_memory(
    backbone: Backbone, selector: AudioSelector, clips: list[Clip], limit_bytes: int
) -> None:
    """Compress all clips in batches that fit the limit, one queued behind the other."""
    device = backbone.device
    compressor = VideoCompressor(
        backbone, selector, drop_shares(RETAIN), memory_limit_bytes=limit_bytes
    )
    batches = list(compressor.budget.split([clip.size for clip in clips]))
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    before = None
    for places in batches:
        pending = compressor.start([clips[place] for place in places])
        if before is not None:
            before.result()
        before = pending
    assert before is not None
    before.result()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) - weights
    print(
        f"| memory, {len(clips)} videos, limit {limit_bytes / 2**30:.0f} GiB | "
        f"{peak / 2**30:.2f} GiB above the weights, {len(batches)} batches, "
        f"{seconds / len(clips) * 1e3:.0f} ms a video | | | |"
    )
    if peak > limit_bytes:
        raise RuntimeError(f"a batch took {peak} bytes, {limit_bytes} were allowed")


class Llms(NamedTuple):
    """The same LLM twice."""

    ours: Backbone
    stock: Any  # a copy: our prefill compiles parts of the model where they are

    def tokens(self, number: int) -> Tensor:
        """Return random embeddings [L, D]."""
        width = self.stock.config.text_config.hidden_size
        return torch.randn(number, width, device=self.stock.device, dtype=self.stock.dtype)


@torch.inference_mode()
def measure_prefill(llms: Llms, sizes: Sizes) -> None:
    """Measure the LLM over the kept tokens against stock, and against no compression."""
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
    report(part, times["ours"], times["stock"], note)
    report(part, times["ours"], times["full"], f"against all {4 * sizes.kept_tokens:,}")


@torch.inference_mode()
def measure_questions(llms: Llms, sizes: Sizes) -> None:
    """Measure questions about one video against reading the video again for each."""
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
        """Return the same, one question after the other from the beginning."""
        answers = []
        for question in questions[:number]:
            embeds, places = torch.cat([context, question])[None], positions[:, None].to(device)
            past: Any = None
            chosen: list[Tensor] = []
            while len(chosen) < sizes.answer_tokens:
                output = llms.stock(
                    inputs_embeds=embeds,
                    position_ids=places,
                    past_key_values=past,
                    use_cache=True,
                    logits_to_keep=1,
                )
                past, places = output.past_key_values, places[:, :, -1:] + 1
                chosen.append(output.logits[:, -1].argmax(-1))
                embeds = llms.stock.get_input_embeddings()(chosen[-1])[:, None]
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
    report(part, times["all"], times["stock"], note)
    further = (times["all"].median_ms - times["one"].median_ms) / (sizes.questions - 1)
    again = times["stock"].median_ms / sizes.questions
    print(f"| a further question | {further:.2f} ms | {again:.2f} ms | {again / further:.1f}x | |")


def machine(device: torch.device) -> str:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return (
        f"{name or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tiny model on any machine")
    size.add_argument("--small", action="store_true", help="the model that ships, on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.quick or options.small else "cuda")
    if options.quick:
        sizes = Sizes(tiny_config(), 4, 2, (1, 4), 64, 3, 4, rounds=2)
    elif options.small:
        sizes = Sizes(thinker_config(FOLDER), 20, 8, (1, 10), 445, 8, 16, rounds=20)
    else:
        sizes = Sizes(published_config(), 128, 16, (8, 64, 512), 9216, 8, 16, rounds=20)
    print(f"{machine(device)}; median of {sizes.rounds} runs or a quarter of them (range)\n")
    print("| part | ours | alternative | factor | |\n|---|---|---|---|---|")
    llm_layers = sizes.config.text_config.num_hidden_layers
    model = random_model(sizes.config, device, llm_layers=0)
    if "compression" in options.parts:
        measure_compression(Backbone(model), sizes)
    if "towers" in options.parts:
        measure_towers(model, sizes)
    del model
    if {"prefill", "questions"} & set(options.parts):
        gc.collect()
        model = random_model(sizes.config, device, llm_layers=llm_layers)
        llms = Llms(Backbone(model), copy.deepcopy(model))
        if "prefill" in options.parts:
            measure_prefill(llms, sizes)
        if "questions" in options.parts:
            measure_questions(llms, sizes)


if __name__ == "__main__":
    main()
