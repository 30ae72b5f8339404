"""Batches of clips by memory: against every way to cut a list in order."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisift.audio_selection import AudioSelector
from omnisift.batch_memory import ClipSize, MemoryBudget
from omnisift.compress import Sequence3d
from omnisift.compression_plan import DropShares
from omnisift.layout import ModelLayout, place_block
from omnisift.methods import compress_with
from tests.omnisift.tensor_memory import PeakBytes

SIZES = st.builds(
    ClipSize, *(st.integers(1, high) for high in (128, 16, 16)), audio=st.integers(0, 3200)
)
BUDGETS = st.builds(
    MemoryBudget,
    limit_bytes=st.integers(1 << 28, 1 << 33),
    bytes_per_patch=st.just(26_496),
    bytes_per_token=st.just(7168),
    copies=st.integers(3, 6),
    kept=st.floats(0, 1),
)


@settings(deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=7), BUDGETS)
def test_no_cut_of_a_list_into_fitting_batches_has_fewer(
    sizes: list[ClipSize], budget: MemoryBudget
) -> None:
    batches = list(budget.split(sizes))
    assert [place for batch in batches for place in batch] == list(range(len(sizes)))

    def fits(start: int, end: int) -> bool:
        return end - start == 1 or budget.needed(sizes[start:end]) <= budget.limit_bytes

    assert all(fits(batch.start, batch.stop) for batch in batches)
    for num_cuts in range(len(batches) - 1):
        for inner in itertools.combinations(range(1, len(sizes)), num_cuts):
            borders = [0, *inner, len(sizes)]
            assert not all(itertools.starmap(fits, itertools.pairwise(borders)))


@settings(deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3), SIZES, BUDGETS)
def test_another_clip_never_needs_less(
    sizes: list[ClipSize], another: ClipSize, budget: MemoryBudget
) -> None:
    assert budget.needed([*sizes, another]) > budget.needed(sizes)


def test_nothing_is_split_into_nothing() -> None:
    budget = MemoryBudget(1 << 30, 26_496, 7168, copies=3, kept=0.5)
    assert list(budget.split([])) == []


WIDTH = 1024
LAYOUT = ModelLayout()
RAGGED = {
    "the usual": [ClipSize(8, 6, 6, 200)] * 2,
    "silent": [ClipSize(8, 8, 8, 0)] * 2,
    "stamped a second apart": [ClipSize(32, 4, 4, 2400)],
    "one picture under long sound": [ClipSize(1, 4, 4, 1600), ClipSize(16, 4, 4, 400)],
    "all lengths": [ClipSize(8, 4, 4, 150 + 50 * 2**k) for k in range(6)],
    "unlike grids": [ClipSize(8, 2, 2, 200), ClipSize(2, 16, 16, 50)],
}


def _sequences(sizes: list[ClipSize], dtype: torch.dtype) -> list[Sequence3d]:
    sequences = []
    for grids, height, width, audio in sizes:
        block = place_block(
            LAYOUT,
            grids=grids,
            height=height,
            width=width,
            seconds_per_grid=1.0,
            audio_tokens=audio,
        )
        generator = torch.Generator().manual_seed(len(block.ids))
        embeds = torch.randn(len(block.ids), WIDTH, generator=generator).to(dtype)
        sequences.append((embeds, torch.from_numpy(block.ids), torch.from_numpy(block.positions)))
    return sequences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["omnisift", "omnisift_audio_only", "dycoke"])
@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_compression_takes_no_more_than_is_counted(
    sizes: list[ClipSize], method: str, dtype: torch.dtype
) -> None:
    """Counted tensor by tensor, for windows of unlike length; a CPU compiles nothing."""
    sequences = _sequences(sizes, dtype)
    selector = AudioSelector(WIDTH, 256)
    given = sum(embeds.nbytes for embeds, _, _ in sequences)
    with torch.inference_mode(), PeakBytes() as counter:
        compress_with(
            method,
            sequences,
            DropShares(video=0.77, audio=0.5),
            LAYOUT,
            selector=selector,
        )
    budget = MemoryBudget(1 << 30, 26_496, WIDTH * dtype.itemsize, copies=6, kept=0.5)
    assert given + counter.peak <= budget.compressing(sizes)
    assert budget.compressing(sizes) <= budget.needed(sizes)
    assert given + counter.peak > given * 1.5  # something was counted
