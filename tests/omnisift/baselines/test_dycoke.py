"""DyCoke against a slow loop over groups and tokens."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from omnisift.baselines.dycoke import merge_temporally
from omnisift.compress import Compressed, Sequence3d
from omnisift.compression_plan import DropShares
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
    cosine,
    tensors_of,
)


def fast(sequence: Sequence3d, video_drop: float, audio_drop: float) -> Compressed:
    return merge_temporally(sequence, DropShares(video_drop, audio_drop), LAYOUT)


def slow_merge(pieces: list[list[int]], embeds: Tensor, k: float) -> tuple[set[int], float]:
    """Return what one group of up to four pieces loses, and the closest decision's gap."""
    dropped: set[int] = set()
    margin = math.inf
    for later, earlier in ((1, 0), (2, 0), (3, 2)):
        if later >= len(pieces) or len(pieces[later]) != len(pieces[earlier]):
            continue
        alike = [
            cosine(embeds[one], embeds[other])
            for one, other in zip(pieces[later], pieces[earlier], strict=True)
        ]
        order = sorted(range(len(alike)), key=lambda place: (-alike[place], place))
        count = int(len(alike) * k)
        dropped |= {pieces[later][place] for place in order[:count]}
        if 0 < count < len(alike):
            margin = min(margin, alike[order[count - 1]] - alike[order[count]])
    return dropped, margin


def slow_keep(
    prompt: Prompt, embeds: Tensor, video_drop: float, audio_drop: float
) -> tuple[list[bool], float]:
    times = prompt.positions[0]
    video, audio = prompt.places(VIDEO), prompt.places(AUDIO)
    grid_times = sorted({times[index] for index in video})
    keep, margins = [True] * len(prompt.ids), [math.inf]
    for start in range(0, len(grid_times), 4):
        group = grid_times[start : start + 4]
        end = grid_times[start + 4] if start + 4 < len(grid_times) else math.inf
        grids = [[index for index in video if times[index] == time] for time in group]
        heard = [index for index in audio if group[0] <= times[index] < end]
        quarter = len(heard) // 4
        pieces = [heard[i * quarter : (i + 1) * quarter] for i in range(4)]
        for parts, share in ((grids, video_drop), (pieces, audio_drop)):
            dropped, margin = slow_merge(parts, embeds, min(1.0, share * 4 / 3))
            margins.append(margin)
            for index in dropped:
                keep[index] = False
    return keep, min(margins)


@RANDOM
@given(prompt=PROMPTS, video_drop=SHARES, audio_drop=SHARES, seed=st.integers(0, 2**31))
def test_equals_the_slow_loop(
    prompt: Prompt, video_drop: float, audio_drop: float, seed: int
) -> None:
    sequence = tensors_of(prompt, seed)
    keep, margin = slow_keep(prompt, sequence[0], video_drop, audio_drop)
    assume(margin > DECIDED)
    result = fast(sequence, video_drop, audio_drop)
    assert result.keep_mask.tolist() == keep
    assert torch.equal(result.embeds, sequence[0][result.keep_mask])
    assert torch.equal(result.kept_index, result.keep_mask.nonzero().flatten())


def _clip(grids: int, tokens: int, audio: int) -> Prompt:
    ids = [TEXT] + [VIDEO] * (grids * tokens) + [AUDIO] * audio + [TEXT]
    times = [0] + [1 + 25 * (i // tokens) for i in range(grids * tokens)]
    times += [1 + i for i in range(audio)] + [5000]
    return Prompt(ids, [times] * 3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.75])
def test_whole_groups_meet_the_target(share: float) -> None:
    prompt = _clip(grids=8, tokens=100, audio=200)
    result = fast(tensors_of(prompt, 0), share, share)
    kept = result.keep_mask.tolist()
    for token_id in (VIDEO, AUDIO):
        places = prompt.places(token_id)
        assert sum(kept[i] for i in places) / len(places) == pytest.approx(1 - share, abs=0.01)


def test_first_grids_stay_whatever_the_share() -> None:
    prompt = _clip(grids=5, tokens=6, audio=0)
    kept = fast(tensors_of(prompt, 0), 1.0, 1.0).keep_mask[1:-1]
    assert kept.tolist() == [True] * 6 + [False] * 18 + [True] * 6


@pytest.mark.parametrize("grids", [1, 2, 3])
def test_a_last_group_keeps_what_is_new(grids: int) -> None:
    """Everything repeats but one token of the last grid."""
    prompt = _clip(grids=grids, tokens=4, audio=0)
    _, ids, positions = tensors_of(prompt, 0)
    embeds = torch.ones(len(prompt.ids), 8)
    new = 4 * grids - 1
    embeds[new] = torch.tensor([1.0, -1.0] * 4)
    result = fast((embeds, ids, positions), 0.5625, 0.0)  # k = .75
    # f0, the two marks, the new token; of f1 repeating f0 all over, the last of equals
    expected = {0, 1, 2, 3, 4, 4 * grids + 1, new} | ({8} if grids == 3 else set())
    assert set(result.kept_index.tolist()) == expected
