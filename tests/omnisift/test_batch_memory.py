"""Batches of clips by memory: against every way to cut a list in order."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from omnisift.batch_memory import ClipSize, MemoryBudget

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
