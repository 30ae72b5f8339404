"""Measure the parts against what one would run otherwise: `python jobs/benchmark.py [--quick]`.

The whole table needs a GPU with 80 GB and uses the published sizes of Qwen2.5-Omni-7B with random
weights, on which time does not depend. `--quick` runs the same code on any machine with a tiny
model, in seconds: it shows that the benchmark works, not how fast anything is.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.compress import Compressed, compress_batch, drop_shares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.layout import Block, place_block
from omnisift.media import FACTOR, SAMPLE_RATE
from omnisift.mini.tiny import tiny_config

RETAIN = 0.25


@dataclass(frozen=True)
class Sizes:
    """What is measured: one video with sound, 2 frames a second."""

    config: Qwen2_5OmniThinkerConfig
    grids: int  # of a video, one a second
    side: int  # tokens of a grid, down and across
    chunks: tuple[int, ...]  # for the cost of one more
    kept_tokens: int  # for the prefill
    rounds: int


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs."""

    runs: list[float]

    @property
    def median_ms(self) -> float:
        """Return the median in milliseconds."""
        return statistics.median(self.runs) * 1e3

    def __str__(self) -> str:
        """Write median and range."""
        low, high = min(self.runs) * 1e3, max(self.runs) * 1e3
        return f"{self.median_ms:.2f} ms ({low:.2f}-{high:.2f})"


def published_config() -> Qwen2_5OmniThinkerConfig:
    """Return the sizes of Qwen2.5-Omni-7B; transformers' defaults differ in the vision tower."""
    config = Qwen2_5OmniThinkerConfig.from_dict(
        {
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "window_size": 112,
            },
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [16, 24, 24],
                },
            },
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        }
    )
    assert isinstance(config, Qwen2_5OmniThinkerConfig)
    return config


def random_model(config: Qwen2_5OmniThinkerConfig, device: torch.device, *, llm_layers: int) -> Any:
    """Make a thinker of these sizes with random weights, none of them zero."""
    config.text_config.num_hidden_layers = llm_layers
    config.text_config.layer_types = ["full_attention"] * llm_layers
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Qwen2_5OmniThinkerForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.02)
    return model.eval().requires_grad_(False)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternately(
    versions: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, Times]:
    """Time the versions in turns, so that a drift of the machine meets them all."""
    runs: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(rounds + 2):
        for name, version in versions.items():
            _settle(device)
            start = time.perf_counter()
            version()
            _settle(device)
            if turn >= 2:  # the first ones compile and allocate
                runs[name].append(time.perf_counter() - start)
    return {name: Times(seconds) for name, seconds in runs.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|."""
    wanted = expected.double()
    return float((actual.double() - wanted).norm() / wanted.norm())


def report(part: str, ours: Times, other: Times | None, note: str = "") -> None:
    """Print one line of the table."""
    against = "" if other is None else f"{other}"
    factor = "" if other is None else f"{other.median_ms / ours.median_ms:.2f}x"
    print(f"| {part} | {ours} | {against} | {factor} | {note} |", flush=True)


def chunk_loop(
    embeds: Tensor, ids: Tensor, positions: Tensor, selector: AudioSelector, block_ids: tuple[int, int]
) -> Tensor:
    """Compress chunk by chunk, as the published code does; return the keep mask."""
    shares = drop_shares(RETAIN)
    keep = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    is_video, is_audio = ids == block_ids[0], ids == block_ids[1]
    times = positions[0][is_video].unique().tolist()
    for start in range(0, len(times), 2):
        end = times[start + 2] if start + 2 < len(times) else positions[0].max().item() + 1
        grids = [
            torch.nonzero(is_video & (positions[0] == t)).squeeze(1) for t in times[start : start + 2]
        ]
        first = embeds[grids[0]].float()
        similar = [torch.cosine_similarity(first, first.mean(0, keepdim=True), dim=-1)]
        if len(grids) > 1:
            similar.append(torch.cosine_similarity(embeds[grids[1]].float(), first, dim=-1))
        for grid, similarity in zip(grids, similar, strict=True):
            dropped = similarity.topk(int(len(grids[0]) * shares.video)).indices
            keep[grid[dropped]] = False
        context = torch.cat([grid[keep[grid]] for grid in grids])
        window = (positions[0] >= times[start]) & (positions[0] < end)
        audio = torch.nonzero(is_audio & window).squeeze(1)
        if len(context) and len(audio) > 1:
            everyone = torch.ones(1, len(context), dtype=torch.bool, device=ids.device)
            score = selector(embeds[context].float()[None], everyone, embeds[audio].float()[None])
            kept = score[0].topk(len(audio) - int(len(audio) * shares.audio)).indices
            keep[audio] = False
            keep[audio[kept]] = True
    return keep


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
            with _no_waiting(device):
                [result] = compress_batch(
                    [sequence],
                    selector=selector,
                    video_drop=shares.video,
                    audio_drop=shares.audio,
                    video_token_id=layout.video_token_id,
                    audio_token_id=layout.audio_token_id,
                )
            return result

        def loop(sequence: tuple[Tensor, Tensor, Tensor] = on_device) -> Tensor:
            kinds = (layout.video_token_id, layout.audio_token_id)
            return chunk_loop(*sequence, selector, kinds)

        same = float((ours().keep_mask == loop()).double().mean())
        times = alternately({"ours": ours, "loop": loop}, device, sizes.rounds)
        costs.append((chunks, times["ours"], times["loop"]))
        note = f"{chunks} chunks of {2 * sizes.side**2}; {same:.4%} of decisions alike"
        report(f"compression, {len(ids):,} tokens", times["ours"], times["loop"], note)
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
        _settle(device)
        start = time.perf_counter()
        [actual] = getattr(packed, encode)(media)
        _settle(device)
        note = f"relative error {relative_error(actual, wanted):.1e}"
        note += f", first call {time.perf_counter() - start:.0f} s"
        call = alternately({"packed": lambda: getattr(packed, encode)(media)}, device, rounds)
        report(f"{kind} tower, {sizes.grids} s", call["packed"], alone[kind], note)
    several = alternately(
        {"four": lambda: packed.encode_video([clip.frames for clip in clips])}, device, rounds
    )
    report("vision tower, 4 videos in one call", several["four"], None)
    _measure_whole(packed, clips, rounds)


def _measure_whole(backbone: Backbone, clips: list[Clip], rounds: int) -> None:
    device = backbone.device
    compressor = VideoCompressor(backbone, AudioSelector(backbone.width), drop_shares(RETAIN))
    gibibytes = ""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compressor(clips[:1])
        one = torch.cuda.max_memory_allocated(device) - weights
        compressor(clips)
        four = torch.cuda.max_memory_allocated(device) - weights
        gibibytes = f"peak above the weights {one / 2**30:.2f} GiB, four at once {four / 2**30:.2f}"
    whole = alternately({"one": lambda: compressor(clips[:1])}, device, rounds)
    report("frames and sound to kept tokens", whole["one"], None, gibibytes)


@torch.inference_mode()
def measure_prefill(model: Any, sizes: Sizes) -> None:
    """Measure the LLM over the kept tokens against stock, and against no compression."""
    device, width = model.device, model.config.text_config.hidden_size
    # transformers moved the decoder one module down between 5.17 and 5.23.
    decoder = getattr(model.model, "language_model", model.model)

    def inputs(num_tokens: int) -> dict[str, Any]:
        embeds = torch.randn(1, num_tokens, width, device=device, dtype=model.dtype)
        positions = torch.arange(num_tokens, device=device).expand(3, 1, -1)
        return {"inputs_embeds": embeds, "position_ids": positions, "use_cache": True}

    def prefill(batch: dict[str, Any]) -> Tensor:
        # The thinker's forward would make logits of every position: 2.8 GB at these sizes.
        logits: Tensor = model.lm_head(decoder(**batch).last_hidden_state[:, -1:])
        return logits

    kept, full = inputs(sizes.kept_tokens), inputs(4 * sizes.kept_tokens)
    versions = {
        "kept": lambda: prefill(kept),
        "stock": lambda: model(**kept).logits,
        "full": lambda: prefill(full),
    }
    times = alternately(versions, device, max(2, sizes.rounds // 4))
    error = relative_error(versions["kept"]()[:, -1], versions["stock"]()[:, -1])
    part = f"prefill, {sizes.kept_tokens:,} kept tokens"
    report(part, times["kept"], times["stock"], f"relative error {error:.1e}")
    report(part, times["kept"], times["full"], f"against all {4 * sizes.kept_tokens:,}")


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
    parser.add_argument("--quick", action="store_true", help="a tiny model on any machine")
    parser.add_argument(
        "--parts", nargs="+", default=["compression", "towers", "prefill"], help="what to measure"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        sizes = Sizes(tiny_config(), 4, 2, (1, 4), 64, rounds=2)
        device = torch.device("cpu")
    else:
        sizes = Sizes(published_config(), 128, 16, (8, 64, 512), 9216, rounds=20)
        device = torch.device("cuda")
    print(f"{machine(device)}; median of {sizes.rounds} runs or a quarter of them (range)\n")
    print("| part | ours | alternative | factor | |\n|---|---|---|---|---|")
    llm_layers = sizes.config.text_config.num_hidden_layers
    model = random_model(sizes.config, device, llm_layers=0)
    if "compression" in options.parts:
        measure_compression(Backbone(model), sizes)
    if "towers" in options.parts:
        measure_towers(model, sizes)
    del model
    if "prefill" in options.parts:
        gc.collect()
        measure_prefill(random_model(sizes.config, device, llm_layers=llm_layers), sizes)


if __name__ == "__main__":
    main()
