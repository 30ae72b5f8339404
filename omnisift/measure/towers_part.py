"""The packed towers against the stock ones, then a whole video and the memory of several."""

import copy
import gc
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.compress import drop_shares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.measure.table import RETAIN, Sizes, line, relative_error
from omnisift.measure.timing import alternately, no_waiting, settle
from omnisift.media import FACTOR, SAMPLE_RATE


def _clip(sizes: Sizes, seed: int) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    size = (2 * sizes.grids, sizes.side * FACTOR, sizes.side * FACTOR, 3)
    return Clip(
        frames=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        audio=torch.randn(sizes.grids * SAMPLE_RATE, generator=generator) * 0.1,
        fps=2.0,
    )


def measure_towers(model: Any, sizes: Sizes) -> Iterator[str]:
    """Yield the packed towers against the stock ones, then a whole video and its memory."""
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
        yield line(f"{kind} tower, {sizes.grids} s", call[kind], alone[kind], note)
    several = alternately(
        {"four": lambda: packed.encode_video([clip.frames for clip in clips])}, device, rounds
    )
    yield line("vision tower, 4 videos in one call", several["four"], None)
    yield from _measure_whole(packed, clips, rounds)


def _measure_whole(backbone: Backbone, clips: list[Clip], rounds: int) -> Iterator[str]:
    selector = AudioSelector(backbone.width).requires_grad_(requires_grad=False)
    compressor = VideoCompressor(backbone, selector, drop_shares(RETAIN))
    whole = alternately({"one": lambda: compressor(clips[:1])}, backbone.device, rounds)
    yield line("frames and sound to kept tokens", whole["one"], None)
    with no_waiting(backbone.device):
        pending = compressor.start(clips[:1])
    pending.result()
    if backbone.device.type == "cuda":
        for gibibytes in (2, 3, 6):
            yield from _measure_memory(backbone, selector, clips, gibibytes << 30)


def _measure_memory(
    backbone: Backbone, selector: AudioSelector, clips: list[Clip], limit_bytes: int
) -> Iterator[str]:
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
    yield (
        f"| memory, {len(clips)} videos, limit {limit_bytes / 2**30:.0f} GiB | "
        f"{peak / 2**30:.2f} GiB above the weights, {len(batches)} batches, "
        f"{seconds / len(clips) * 1e3:.0f} ms a video | | | |"
    )
    if peak > limit_bytes:
        raise RuntimeError(f"a batch took {peak} bytes, {limit_bytes} were allowed")
