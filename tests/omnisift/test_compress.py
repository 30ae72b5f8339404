"""The compression against slow loops (slow_compress.py), on random and on real layouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnisift.audio_selection import AudioSelector
from omnisift.compress import Compressed, compress_batch, drop_shares
from omnisift.compression_plan import DropShares, plan_compression
from omnisift.layout import ModelLayout, place_block
from tests.omnisift.slow_compress import SlowCompressed, slow_chunks, slow_compress

LAYOUT = ModelLayout()
VIDEO, AUDIO, TEXT = LAYOUT.video_token_id, LAYOUT.audio_token_id, 100
WIDTH, HIDDEN, HEADS = 8, 16, 2
# Fast and slow sum in another order: a decision closer than this may fall either way.
DECIDED = 1e-5

RANDOM = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Sequence3d:
    """Ids and positions of one prompt."""

    ids: list[int]  # [L]
    positions: list[list[int]]  # [3, L]


def in_order(tokens: list[tuple[int, int, int, int]]) -> Sequence3d:
    """Turn (id, time, height, width) of each token into a sequence."""
    ids, *positions = (list(row) for row in zip(*tokens, strict=True))
    return Sequence3d(ids, positions)


@st.composite
def invented_layouts(draw: st.DrawFn) -> Sequence3d:
    """Draw unequal grids, gaps, sound before and behind the video, any order of the tokens."""
    num_grids = draw(st.integers(0, 7))
    if draw(st.booleans()):
        sizes = [draw(st.integers(1, 9))] * num_grids
    else:
        sizes = draw(st.lists(st.integers(1, 6), min_size=num_grids, max_size=num_grids))
    step = draw(st.sampled_from([5, 12.5, 25, 33.25, 50]))  # 12.5: half a second a grid; 50: two
    start = draw(st.integers(0, 20))
    media = [
        (VIDEO, start + int(grid * step), row, grid)
        for grid, size in enumerate(sizes)
        for row in range(size)
    ]
    audio_start = start + draw(st.sampled_from([0, 0, 0, -7, 9]))
    num_audio = draw(st.sampled_from([0, 1, 2, 20, 60]) | st.integers(0, 80))
    media += [(AUDIO, time, time, time) for time in range(audio_start, audio_start + num_audio)]
    order = draw(st.sampled_from(["interleaved", "one after another", "shuffled"]))
    if order == "interleaved":
        media.sort(key=lambda token: token[1])
    elif order == "shuffled":
        media = draw(st.permutations(media))
    before = draw(st.integers(0, 3))
    behind = 2000
    return in_order(
        [(TEXT, i, i, i) for i in range(before)]
        + media
        + [(TEXT, behind + i, behind + i, behind + i) for i in range(draw(st.integers(1, 3)))]
    )


@st.composite
def placed_layouts(draw: st.DrawFn) -> Sequence3d:
    """Draw a block as the product lays it out, with text around it."""
    block = place_block(
        LAYOUT,
        grids=draw(st.integers(1, 7)),
        height=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 3)),
        seconds_per_grid=draw(st.sampled_from([0.2, 0.5, 1.0, 1.0, 1.3, 2.0])),
        audio_tokens=draw(st.sampled_from([0, 1, 25, 100]) | st.integers(0, 120)),
    )
    before, after = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    after_positions = block.next_position + before + np.arange(after)
    positions = np.concatenate(
        [
            np.broadcast_to(np.arange(before), (3, before)),
            block.positions + before,
            np.broadcast_to(after_positions, (3, after)),
        ],
        axis=1,
    )
    return Sequence3d([TEXT] * before + block.ids.tolist() + [TEXT] * after, positions.tolist())


# Windows of 10, 10 and 70 audio tokens: the last has no end, and a group of its own.
LONG_SOUND = in_order(
    [(VIDEO, 5 * grid, row, grid) for grid in range(6) for row in range(3)]
    + [(AUDIO, time, time, time) for time in range(90)]
)
LAYOUTS = invented_layouts() | placed_layouts()
SHARES = st.sampled_from([0.0, 0.3, 0.4, 0.5, 0.67, 0.7, 0.77, 1.0]) | st.floats(0, 1)


def random_selector(seed: int) -> AudioSelector:
    selector = AudioSelector(WIDTH, HIDDEN, HEADS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return selector


def tensors_of(
    layout: Sequence3d, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # a common part, as real features have: cosines then are not spread around zero
    embeds = torch.randn(len(layout.ids), WIDTH, generator=generator) + 0.5
    return embeds.to(dtype), torch.tensor(layout.ids), torch.tensor(layout.positions)


def fast(
    sequences: Sequence[tuple[Tensor, Tensor, Tensor]],
    selector: AudioSelector | None,
    video_drop: float,
    audio_drop: float,
) -> list[Compressed]:
    return compress_batch(sequences, DropShares(video_drop, audio_drop), LAYOUT, selector=selector)


def slow(
    embeds: Tensor,
    layout: Sequence3d,
    selector: AudioSelector,
    video_drop: float,
    audio_drop: float,
) -> SlowCompressed:
    return slow_compress(
        embeds,
        layout.ids,
        layout.positions[0],
        weights=dict(selector.named_parameters()),
        num_heads=HEADS,
        video_drop=video_drop,
        audio_drop=audio_drop,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )


def assert_same(one: Compressed, other: Compressed) -> None:
    assert torch.equal(one.keep_mask, other.keep_mask)
    assert torch.equal(one.kept_index, other.kept_index)
    assert one.embeds.dtype == other.embeds.dtype
    assert torch.equal(one.embeds, other.embeds)


@RANDOM
@given(
    layouts=st.lists(LAYOUTS, min_size=1, max_size=3),
    video_drop=SHARES,
    audio_drop=SHARES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@example(layouts=[LONG_SOUND] * 2, video_drop=0.77, audio_drop=0.5, dtype=torch.float32, seed=7)
def test_equals_the_slow_loop_alone_and_in_a_batch(
    layouts: list[Sequence3d], video_drop: float, audio_drop: float, dtype: torch.dtype, seed: int
) -> None:
    selector = random_selector(seed)
    sequences = [tensors_of(layout, seed + i, dtype) for i, layout in enumerate(layouts)]
    copies = [tuple(tensor.clone() for tensor in sequence) for sequence in sequences]
    with torch.no_grad():
        expected = [
            slow(embeds, layout, selector, video_drop, audio_drop)
            for (embeds, _, _), layout in zip(sequences, layouts, strict=True)
        ]
        assume(min(result.margin for result in expected) > DECIDED)
        batch = fast(sequences, selector, video_drop, audio_drop)
        again = fast(sequences, selector, video_drop, audio_drop)
        alone = [fast([sequence], selector, video_drop, audio_drop)[0] for sequence in sequences]
    for (embeds, _, _), oracle, result in zip(sequences, expected, batch, strict=True):
        assert result.keep_mask.dtype == torch.bool
        assert result.keep_mask.tolist() == oracle.keep
        kept = [index for index, keep in enumerate(oracle.keep) if keep]
        assert result.kept_index.tolist() == kept
        assert torch.equal(result.embeds, embeds[kept])
        assert result.embeds.dtype == dtype
    for one, other in zip(batch + batch, again + alone, strict=True):
        assert_same(one, other)
    for sequence, copy in zip(sequences, copies, strict=True):
        assert all(torch.equal(now, before) for now, before in zip(sequence, copy, strict=True))


@settings(RANDOM, max_examples=80)
@given(
    layouts=st.lists(LAYOUTS, min_size=1, max_size=2),
    video_drop=SHARES,
    audio_drop=SHARES,
    seed=st.integers(0, 2**31),
)
@example(layouts=[LONG_SOUND] * 2, video_drop=0.77, audio_drop=0.5, seed=7)
def test_gradients_equal_the_slow_loops_autograd(
    layouts: list[Sequence3d], video_drop: float, audio_drop: float, seed: int
) -> None:
    """Through the straight-through estimator, to the embeddings and to every weight."""
    losses, gradients = [], []
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(WIDTH, generator=generator)
    for use_slow in (True, False):
        selector = random_selector(seed)
        sequences = [tensors_of(layout, seed + i) for i, layout in enumerate(layouts)]
        leaves = [embeds.requires_grad_() for embeds, _, _ in sequences]
        if use_slow:
            oracle = [
                slow(embeds, layout, selector, video_drop, audio_drop)
                for embeds, layout in zip(leaves, layouts, strict=True)
            ]
            assume(min(result.margin for result in oracle) > DECIDED)
            kept = [result.embeds for result in oracle]
        else:
            results = fast(sequences, selector, video_drop, audio_drop)
            kept = [result.embeds for result in results]
            for leaf, result in zip(leaves, results, strict=True):
                # forward, the factor is exactly 1: training sees what inference sees
                assert torch.equal(result.embeds.detach(), leaf.detach()[result.kept_index])
        loss = torch.stack([torch.sigmoid(rows @ target).sum() for rows in kept]).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        variables = [*leaves, *selector.parameters()]
        gradients.append([torch.zeros_like(v) if v.grad is None else v.grad for v in variables])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_reaches_the_selector_in_bfloat16() -> None:
    layout = block_sequence(grids=4, height=2, width=3, audio_tokens=100)
    embeds, ids, positions = tensors_of(layout, 3, torch.bfloat16)
    selector = random_selector(3)
    embeds.requires_grad_()
    [result] = fast([(embeds, ids, positions)], selector, 0.5, 0.5)
    assert result.embeds.dtype == torch.bfloat16
    assert torch.equal(result.embeds, embeds[result.keep_mask])
    result.embeds.float().square().sum().backward()
    assert embeds.grad is not None
    assert torch.isfinite(embeds.grad).all()
    weight = selector.a_proj.weight.grad
    assert weight is not None
    assert torch.isfinite(weight).all()
    assert weight.abs().max() > 0


def block_sequence(
    *, grids: int, height: int, width: int, audio_tokens: int, seconds_per_grid: float = 1.0
) -> Sequence3d:
    block = place_block(
        LAYOUT,
        grids=grids,
        height=height,
        width=width,
        seconds_per_grid=seconds_per_grid,
        audio_tokens=audio_tokens,
    )
    return Sequence3d(block.ids.tolist(), block.positions.tolist())


@settings(RANDOM, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    equal=st.booleans(),
    video_drop=SHARES,
    seed=st.integers(0, 2**31),
)
def test_of_equally_similar_tokens_the_lower_index_is_dropped(
    sizes: list[int], equal: bool, video_drop: float, seed: int
) -> None:
    """Tokens along the axes: their cosines are few, exact, and mostly tied."""
    sizes = [sizes[0]] * len(sizes) if equal else sizes
    tokens = [(VIDEO, 25 * g, i, g) for g, size in enumerate(sizes) for i in range(size)]
    layout = in_order(tokens)
    _, ids, positions = tensors_of(layout, seed)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randint(0, 3, (len(tokens),), generator=generator)
    lengths = 2.0 ** torch.randint(-2, 3, (len(tokens),), generator=generator)
    embeds = torch.eye(WIDTH)[axes] * lengths[:, None]
    selector = random_selector(seed)
    oracle = slow(embeds, layout, selector, video_drop, 0.0)
    [result] = fast([(embeds, ids, positions)], selector, video_drop, 0.0)
    assert result.keep_mask.tolist() == oracle.keep


def test_only_windows_of_unlike_length_are_decided_apart() -> None:
    usual = block_sequence(grids=9, height=2, width=2, audio_tokens=237)
    for layouts, groups in (([usual] * 3, 1), ([LONG_SOUND] * 2, 2)):
        plan = plan_compression(
            [(torch.tensor(one.ids), torch.tensor(one.positions)) for one in layouts],
            DropShares(0.77, 0.5),
            LAYOUT,
            device=torch.device("cpu"),
        )
        assert len(plan.audio) == groups
        padded = sum(audio.audio.numel() for audio in plan.audio)
        assert padded <= 2 * sum(one.ids.count(AUDIO) for one in layouts)


@pytest.mark.parametrize("gradients", [False, True])
def test_exploring_sees_each_audio_token_once_and_decides(gradients: bool) -> None:
    """Scores that rise along each window keep its end; padding scores highest and is nowhere."""
    seen = []

    def explore(score_RA: Tensor, valid_RA: Tensor) -> Tensor:
        seen.append(int(valid_RA.sum()))
        return torch.where(valid_RA, score_RA + torch.arange(score_RA.shape[1]), 1e3)

    sequence = tensors_of(LONG_SOUND, 0)
    with torch.set_grad_enabled(gradients):
        results = compress_batch(
            [sequence] * 2,
            DropShares(0.5, 0.5),
            LAYOUT,
            selector=random_selector(0),
            explore=explore,
        )
    assert sorted(seen) == [2 * 20, 2 * 70]
    for result in results:
        kept = result.keep_mask[sequence[1] == AUDIO].tolist()
        assert kept == [
            half for size in (10, 10, 70) for half in [False] * (size // 2) + [True] * (size // 2)
        ]


def test_a_still_grid_loses_its_first_tokens() -> None:
    layout = block_sequence(grids=4, height=2, width=5, audio_tokens=0)
    _, ids, positions = tensors_of(layout, 0)
    embeds = torch.ones(len(layout.ids), WIDTH)
    [result] = fast([(embeds, ids, positions)], None, 0.75, 0.0)
    grid = [False] * 7 + [True] * 3  # int(10 * 0.75) = 7
    assert result.keep_mask.tolist() == [True, *grid * 4, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_audio_scores_the_lower_index_is_kept(dtype: torch.dtype) -> None:
    layout = block_sequence(grids=6, height=2, width=2, audio_tokens=131)
    embeds, ids, positions = tensors_of(layout, 1, dtype)
    selector = random_selector(1)
    with torch.no_grad():
        # Equal tokens would not do: matrix products may round the rows of a block's tail apart.
        selector.score_head[2].get_parameter("weight").zero_()
        [result] = fast([(embeds, ids, positions)], selector, 0.0, 0.4)
    kept = result.keep_mask[ids == AUDIO].tolist()
    chunk = [True] * 30 + [False] * 20  # 50 - int(50 * 0.4)
    last = [True] * 19 + [False] * 12  # 31 - int(31 * 0.4)
    assert kept == chunk + chunk + last


@settings(RANDOM, max_examples=100)
@given(layout=LAYOUTS, seed=st.integers(0, 2**31))
def test_drop_shares_0_mean_off(layout: Sequence3d, seed: int) -> None:
    sequence = tensors_of(layout, seed)
    [result] = fast([sequence], random_selector(seed), 0.0, 0.0)
    assert result.keep_mask.all()
    assert torch.equal(result.embeds.detach(), sequence[0])


@pytest.mark.parametrize("gradients", [False, True])
def test_off_needs_no_selector(gradients: bool) -> None:
    layout = block_sequence(grids=4, height=2, width=2, audio_tokens=100)
    sequence = tensors_of(layout, 0)
    with torch.set_grad_enabled(gradients):
        [result] = fast([sequence], None, 0.0, 0.0)
    assert torch.equal(result.embeds, sequence[0])


@pytest.mark.parametrize("gradients", [False, True])
def test_video_alone_is_pruned_without_a_selector(gradients: bool) -> None:
    """Sound is left whole: only the video share is above 0."""
    layout = block_sequence(grids=4, height=2, width=5, audio_tokens=100)
    sequence = tensors_of(layout, 0)
    with torch.set_grad_enabled(gradients):
        [result] = fast([sequence], None, 0.7, 0.0)
    assert int(result.keep_mask[sequence[1] == VIDEO].sum()) == 4 * 3
    assert result.keep_mask[sequence[1] != VIDEO].all()


def test_without_surviving_video_all_sound_stays() -> None:
    layout = block_sequence(grids=5, height=2, width=2, audio_tokens=125)
    sequence = tensors_of(layout, 0)
    [result] = fast([sequence], random_selector(0), 1.0, 1.0)
    assert torch.equal(result.keep_mask, sequence[1] != VIDEO)


def test_all_sound_goes_where_all_of_it_is_to_be_dropped() -> None:
    layout = block_sequence(grids=5, height=2, width=2, audio_tokens=125)
    sequence = tensors_of(layout, 0)
    [result] = fast([sequence], random_selector(0), 0.0, 1.0)
    assert torch.equal(result.keep_mask, sequence[1] != AUDIO)


@pytest.mark.parametrize(
    "ids",
    [[TEXT] * 3, [TEXT, AUDIO, AUDIO, AUDIO, AUDIO, TEXT], [AUDIO]],
    ids=["text", "sound", "one sound"],
)
def test_sequences_without_video_are_left_whole(ids: list[int]) -> None:
    layout = in_order([(id_, i, i, i) for i, id_ in enumerate(ids)])
    sequence = tensors_of(layout, 0)
    [result] = fast([sequence], random_selector(0), 0.5, 0.5)
    assert result.keep_mask.tolist() == [True] * len(ids)
    assert torch.equal(result.embeds, sequence[0])
    results = fast([sequence, sequence], random_selector(0), 0.5, 0.5)
    assert all(torch.equal(one.embeds, sequence[0]) for one in results)


@settings(RANDOM, max_examples=100)
@given(layout=LAYOUTS, video_drop=SHARES, audio_drop=SHARES, seed=st.integers(0, 2**31))
def test_the_number_of_kept_tokens_follows_from_the_layout(
    layout: Sequence3d, video_drop: float, audio_drop: float, seed: int
) -> None:
    chunks = slow_chunks(
        layout.ids, layout.positions[0], video_token_id=VIDEO, audio_token_id=AUDIO
    )
    dropped = 0
    for chunk in chunks:
        from_grid = math.floor(len(chunk.first) * video_drop)
        from_video = from_grid * (2 if len(chunk.second) == len(chunk.first) else 1)
        survivors = len(chunk.first) + len(chunk.second) - from_video
        dropped += from_video
        if survivors > 0 and len(chunk.audio) > 1:
            dropped += math.floor(len(chunk.audio) * audio_drop)
    with torch.no_grad():
        [result] = fast([tensors_of(layout, seed)], random_selector(seed), video_drop, audio_drop)
    assert result.embeds.shape == (len(layout.ids) - dropped, WIDTH)
    assert int(result.keep_mask.sum()) == len(layout.ids) - dropped


@pytest.mark.parametrize(("retain", "video", "audio"), [(0.35, 0.67, 0.40), (0.25, 0.77, 0.50)])
def test_published_settings(retain: float, video: float, audio: float) -> None:
    assert drop_shares(retain) == DropShares(video=video, audio=audio)


def test_retaining_all_drops_nothing() -> None:
    assert drop_shares(1.0) == DropShares(video=0.0, audio=0.0)


@given(low=st.floats(0, 1), high=st.floats(0, 1))
@settings(derandomize=True, deadline=None, database=None)
def test_retaining_more_never_drops_more(low: float, high: float) -> None:
    low, high = sorted((low, high))
    small, large = drop_shares(low), drop_shares(high)
    assert 0 <= large.video <= small.video <= 1
    assert 0 <= large.audio <= small.audio <= 1


def test_blank_frames_and_silence_are_compressed_without_nan() -> None:
    layout = block_sequence(grids=4, height=2, width=2, audio_tokens=100)
    _, ids, positions = tensors_of(layout, 0)
    embeds = torch.zeros(len(layout.ids), WIDTH, requires_grad=True)
    selector = random_selector(0)
    [result] = fast([(embeds, ids, positions)], selector, 0.5, 0.5)
    assert int(result.keep_mask[ids == VIDEO].sum()) == 8
    assert int(result.keep_mask[ids == AUDIO].sum()) == 50
    result.embeds.sum().backward()
    assert embeds.grad is not None
    assert torch.isfinite(embeds.grad).all()


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("name", ["video_drop", "audio_drop"])
def test_a_share_outside_0_to_1_is_refused(name: str, share: float) -> None:
    sequence = tensors_of(block_sequence(grids=2, height=1, width=1, audio_tokens=4), 0)
    shares = {"video_drop": 0.5, "audio_drop": 0.5} | {name: share}
    with pytest.raises(ValueError, match=name):
        fast([sequence], random_selector(0), **shares)


@pytest.mark.parametrize(
    "shapes",
    [
        ((6, WIDTH), (5,), (3, 6)),
        ((6, WIDTH), (6,), (3, 5)),
        ((6, WIDTH), (6,), (6, 3)),
        ((6, WIDTH), (6,), (2, 6)),
        ((6, WIDTH), (1, 6), (3, 6)),
        ((6, WIDTH), (6,), (3, 1, 6)),
        ((1, 6, WIDTH), (6,), (3, 6)),
        ((6,), (6,), (3, 6)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    embeds, ids, positions = shapes
    sequence = (
        torch.zeros(embeds),
        torch.full(ids, VIDEO),
        torch.zeros(positions, dtype=torch.long),
    )
    with pytest.raises(ValueError, match="expected inputs_embeds"):
        fast([sequence], random_selector(0), 0.5, 0.5)


def test_selecting_audio_without_a_selector_is_refused() -> None:
    sequence = tensors_of(block_sequence(grids=4, height=2, width=2, audio_tokens=100), 0)
    with torch.no_grad(), pytest.raises(ValueError, match="selector"):
        fast([sequence], None, 0.5, 0.5)


def test_a_silent_video_needs_no_selector() -> None:
    sequence = tensors_of(block_sequence(grids=4, height=2, width=5, audio_tokens=0), 0)
    [result] = fast([sequence], None, 0.7, 0.4)
    assert int(result.keep_mask.sum()) == 2 + 4 * 3
