"""Compression against the chunk loop, and the cost of one more chunk."""

from collections.abc import Iterator

import torch
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.compress import Compressed, compress_batch, drop_shares
from omnisift.layout import Block, place_block
from omnisift.measure.chunk_loop import chunk_loop
from omnisift.measure.table import RETAIN, Sizes, line
from omnisift.measure.timing import Times, alternately, behind_other_work, no_waiting


def _block(backbone: Backbone, grids: int, side: int) -> Block:
    return place_block(
        backbone.layout,
        grids=grids,
        height=side,
        width=side,
        seconds_per_grid=1.0,
        audio_tokens=grids * backbone.layout.positions_per_second,
    )


@torch.inference_mode()
def measure_compression(backbone: Backbone, sizes: Sizes) -> Iterator[str]:
    """Yield compression against the loop, and the cost of one more chunk."""
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
        with no_waiting(device):
            ours()
        rounds = max(2, sizes.rounds // 4)
        times = alternately({"ours": ours, "loop": loop}, device, rounds)
        queued = behind_other_work(ours, device, sizes.rounds)
        costs.append((chunks, queued, times["loop"]))
        part = f"compression, {len(ids):,} tokens"
        note = f"{chunks} chunks of {2 * sizes.side**2}; {same:.4%} of decisions alike"
        yield line(f"{part}: behind the towers", queued, times["loop"], note)
        yield line(f"{part}: alone, with its plan", times["ours"], times["loop"])
    (few, ours_few, loop_few), (many, ours_many, loop_many) = costs[0], costs[-1]
    for name, low, high in (("ours", ours_few, ours_many), ("loop", loop_few, loop_many)):
        added = (high.median_ms - low.median_ms) / (many - few)
        yield (f"| one more chunk, {few} to {many}: {name} | {added:.4f} ms | | | |")
