"""OmniZip against slow loops (slow_omnizip.py), exact arithmetic and hand-made cases."""

from fractions import Fraction
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from omnisift.baselines.density_peaks import density_peaks
from omnisift.baselines.omnizip import group_shares, zip_tokens
from omnisift.compress import Compressed, Sequence3d
from omnisift.compression_plan import DropShares
from omnisift.layout import place_block
from tests.omnisift.baselines.layouts import (
    AUDIO,
    DECIDED,
    LAYOUT,
    PROMPTS,
    RANDOM,
    SHARES,
    TEXT,
    VIDEO,
    Prompt,
    placed,
    tensors_of,
)
from tests.omnisift.baselines.slow_omnizip import exact, slow_group_shares, slow_zip


def fast(
    sequence: Sequence3d, importance: Tensor, video_drop: float, audio_drop: float
) -> Compressed:
    return zip_tokens(sequence, DropShares(video_drop, audio_drop), LAYOUT, importance=importance)


def importance_of(prompt: Prompt, seed: int, *, ties: bool = False) -> Tensor:
    drawn = torch.rand(len(prompt.places(AUDIO)), generator=torch.Generator().manual_seed(seed))
    return (drawn * 4).round() if ties else drawn


@RANDOM
@given(
    prompt=PROMPTS,
    video_drop=SHARES,
    audio_drop=SHARES,
    seed=st.integers(0, 2**31),
    ties=st.booleans(),
)
def test_equals_the_slow_loops(
    prompt: Prompt, video_drop: float, audio_drop: float, seed: int, ties: bool
) -> None:
    sequence = tensors_of(prompt, seed)
    importance = importance_of(prompt, seed, ties=ties)
    expected = slow_zip(
        prompt,
        sequence[0],
        importance.tolist(),
        video_drop=video_drop,
        audio_drop=audio_drop,
    )
    assume(expected.margin > DECIDED)
    result = fast(sequence, importance, video_drop, audio_drop)
    assert result.keep_mask.tolist() == expected.keep
    rows = torch.stack(expected.rows)[result.keep_mask]
    torch.testing.assert_close(result.embeds, rows, rtol=0, atol=1e-5)
    assert torch.equal(result.kept_index, result.keep_mask.nonzero().flatten())


GROUPS = st.tuples(
    st.sampled_from([0, 36, 72]) | st.integers(0, 500), st.integers(0, 50), st.floats(0, 1)
).map(lambda group: (group[0], group[1], int(group[1] * group[2])))


@RANDOM
@given(video_drop=SHARES, groups=st.lists(GROUPS, min_size=1, max_size=8))
def test_group_shares_are_the_exact_ones(
    video_drop: float, groups: list[tuple[int, int, int]]
) -> None:
    shares = group_shares(video_drop, *np.array(groups).T)
    expected = slow_group_shares(exact(video_drop), groups)
    assert shares == pytest.approx([float(share) for share in expected], abs=1e-12)


def test_the_mean_over_tokens_is_the_drop_share_where_no_group_is_clamped() -> None:
    video, audio, kept = np.array([[72, 50, 50], [36, 50, 25], [72, 50, 30], [72, 40, 10]]).T
    shares = group_shares(0.56, video, audio, kept)
    assert (shares * video).sum() / video.sum() == pytest.approx(0.56, abs=1e-12)
    assert shares[0] == pytest.approx(0.35)
    assert shares[3] == pytest.approx(0.65)
    assert slow_group_shares(Fraction("0.56"), [(72, 50, 50)] * 2) == [Fraction("0.35")] * 2


@pytest.mark.parametrize("seconds_per_grid", [0.5, 1.0, 2.0])
def test_groups_by_time_are_the_runs_of_the_interleaving(seconds_per_grid: float) -> None:
    """The slow loops, and so the fast ones, count in 50 positions from the first token."""
    grids = int(8 / seconds_per_grid)
    block = place_block(
        LAYOUT, grids=grids, height=2, width=2, seconds_per_grid=seconds_per_grid, audio_tokens=200
    )
    media = np.flatnonzero(block.modality)
    group = (block.positions[0, media] - block.positions[0, media].min()) // 50
    runs = [
        [int(group[place]) for place in run]
        for _, run in groupby(range(len(media)), key=lambda place: block.modality[media[place]])
    ]
    assert runs == [[number] * size for number in range(4) for size in (grids, 50)]


@RANDOM
@given(prompt=placed(), seed=st.integers(0, 100))
def test_the_text_before_a_video_changes_nothing(prompt: Prompt, seed: int) -> None:
    sequence = tensors_of(prompt, seed)
    importance = importance_of(prompt, seed)
    shifted = (sequence[0], sequence[1], sequence[2] + 17)
    one, other = (fast(each, importance, 0.6, 0.5) for each in (sequence, shifted))
    assert torch.equal(one.keep_mask, other.keep_mask)


@pytest.mark.parametrize("ids", [[TEXT, AUDIO, AUDIO, AUDIO, TEXT], [TEXT] * 3, [AUDIO] * 40])
def test_without_video_everything_stays(ids: list[int]) -> None:
    prompt = Prompt(ids, [list(range(len(ids)))] * 3)
    sequence = tensors_of(prompt, 0)
    result = fast(sequence, importance_of(prompt, 0), 0.7, 0.7)
    assert result.keep_mask.all()
    assert torch.equal(result.embeds, sequence[0])


def test_a_silent_video_loses_its_drop_share() -> None:
    prompt = Prompt([VIDEO] * 80, [[25 * (i // 20) for i in range(80)]] * 3)
    result = fast(tensors_of(prompt, 0), torch.empty(0), 0.9, 0.5)
    assert [int(grid.sum()) for grid in result.keep_mask.split(20)] == [2] * 4


def _one_group(num_audio: int) -> Prompt:
    return Prompt([VIDEO] * 8 + [AUDIO] * num_audio, [[0] * 8 + list(range(num_audio))] * 3)


def test_anchors_take_in_the_most_visual_of_their_like() -> None:
    """20 tokens, 10 stay for their importance; of the rest one anchor stands for nine."""
    prompt = _one_group(20)
    embeds, ids, positions = tensors_of(prompt, 0)
    embeds[:8] = torch.eye(8)[0]
    audio = torch.zeros(20, 8)
    audio[:, 1] = 1.0
    audio[[15, 17, 19], 0] = torch.tensor([3.0, 2.0, 1.0])  # like what is seen
    embeds[8:] = audio
    importance = torch.arange(20).flip(0).float()
    result = fast((embeds, ids, positions), importance, 0.0, 0.5)
    assert result.kept_index.tolist() == [*range(18), 18]
    seen = audio[[15, 17, 19], 0] / audio[[15, 17, 19]].norm(dim=1)
    weights = torch.exp(seen) / torch.exp(seen).sum()
    merged = (audio[10] + (weights[:, None] * audio[[15, 17, 19]]).sum(0)) / 2
    torch.testing.assert_close(result.embeds[-1], merged, rtol=0, atol=1e-6)
    assert torch.equal(result.embeds[:-1], embeds[:18])


def test_the_input_is_left_as_it_was() -> None:
    prompt = _one_group(60)
    sequence = tensors_of(prompt, 0)
    before = sequence[0].clone()
    fast(sequence, importance_of(prompt, 0), 0.5, 0.5)
    assert torch.equal(sequence[0], before)


def test_density_peaks_find_the_centres_of_two_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(16)[:2]
    noise = 0.3 * torch.randn(2, 9, 16, generator=generator)
    noise[:, 0] = 0  # the centre itself
    scores = density_peaks(
        (centres[:, None] + noise).reshape(1, 18, 16), torch.ones(1, 18, dtype=torch.bool)
    )
    assert sorted(scores[0].topk(2).indices.tolist()) == [0, 9]


def test_blank_frames_and_silence_give_no_nan() -> None:
    prompt = _one_group(100)
    _, ids, positions = tensors_of(prompt, 0)
    embeds = torch.zeros(len(prompt.ids), 8, requires_grad=True)
    result = fast((embeds, ids, positions), torch.zeros(100), 0.5, 0.5)
    result.embeds.sum().backward()
    assert embeds.grad is not None
    assert torch.isfinite(embeds.grad).all()
    assert torch.isfinite(result.embeds).all()


def test_bfloat16_stays_bfloat16() -> None:
    prompt = _one_group(100)
    result = fast(tensors_of(prompt, 0, torch.bfloat16), importance_of(prompt, 0), 0.5, 0.5)
    assert result.embeds.dtype == torch.bfloat16


def test_importance_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"importance of 20 audio tokens, got \[19\]"):
        fast(tensors_of(_one_group(20), 0), torch.ones(19), 0.5, 0.5)
