"""The ablations: the same counts as the method, another decider for one part of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisift.audio_selection import AudioSelector
from omnisift.compress import Compressed, Sequence3d, compress_batch
from omnisift.compression_plan import COMPLETE, Deciders, DropShares
from tests.omnisift.baselines.layouts import (
    AUDIO,
    LAYOUT,
    PROMPTS,
    RANDOM,
    SHARES,
    VIDEO,
    WIDTH,
    Prompt,
    tensors_of,
)
from tests.omnisift.slow_compress import slow_chunks, slow_scores

HEADS = 2
PARTS = {
    "no spatial": Deciders(spatial=False),
    "no temporal": Deciders(temporal=False),
    "audio only": Deciders(audio="audio"),
    "random audio": Deciders(audio="chance"),
}


def random_selector(seed: int) -> AudioSelector:
    selector = AudioSelector(WIDTH, 16, HEADS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return selector


def run(
    sequence: Sequence3d,
    deciders: Deciders,
    video_drop: float,
    audio_drop: float,
    *,
    key: str = "a",
) -> Compressed:
    [result] = compress_batch(
        [sequence],
        DropShares(video_drop, audio_drop),
        LAYOUT,
        selector=random_selector(0),
        deciders=deciders,
        video_keys=[key],
    )
    return result


@pytest.mark.parametrize("part", PARTS)
@settings(RANDOM, max_examples=50)
@given(prompt=PROMPTS, video_drop=SHARES, audio_drop=SHARES, seed=st.integers(0, 2**31))
def test_another_decider_drops_as_many_of_each_grid_and_sound(
    part: str, prompt: Prompt, video_drop: float, audio_drop: float, seed: int
) -> None:
    sequence = tensors_of(prompt, seed)
    with torch.no_grad():
        complete = run(sequence, COMPLETE, video_drop, audio_drop)
        ablated = run(sequence, PARTS[part], video_drop, audio_drop)
    for chunk in slow_chunks(
        prompt.ids, prompt.positions[0], video_token_id=VIDEO, audio_token_id=AUDIO
    ):
        first, second, audio = (torch.tensor(tokens).long() for tokens in vars(chunk).values())
        one, other = complete.keep_mask, ablated.keep_mask
        assert one[first].sum() == other[first].sum()
        assert one[second].sum() == other[second].sum()
        if part != "no temporal":
            assert torch.equal(one[second], other[second])
        if part != "no spatial":
            assert torch.equal(one[first], other[first])
        # without surviving video only the selector that hears alone still has a context
        if part != "audio only" or one[first].any() or one[second].any():
            assert one[audio].sum() == other[audio].sum()


@RANDOM
@given(prompt=PROMPTS, video_drop=SHARES, seed=st.integers(0, 2**31))
def test_audio_only_attends_to_the_chunks_own_audio(
    prompt: Prompt, video_drop: float, seed: int
) -> None:
    embeds, ids, positions = tensors_of(prompt, seed)
    weights = {name: value.detach() for name, value in random_selector(0).state_dict().items()}
    with torch.no_grad():
        result = run((embeds, ids, positions), Deciders(audio="audio"), video_drop, 0.5)
    for chunk in slow_chunks(
        prompt.ids, prompt.positions[0], video_token_id=VIDEO, audio_token_id=AUDIO
    )[:2]:
        tokens = [embeds[index] for index in chunk.audio[:12]]
        if len(chunk.audio) != len(tokens) or len(tokens) < 2:
            continue
        scores = [float(score) for score in slow_scores(tokens, tokens, weights, HEADS)]
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
        count = len(scores) - len(scores) // 2
        if scores[order[count - 1]] - scores[order[count]] < 1e-5:
            continue
        kept = {place for place, index in enumerate(chunk.audio) if result.keep_mask[index]}
        assert kept == set(order[:count])


@pytest.mark.parametrize("part", ["no spatial", "no temporal", "random audio"])
def test_chance_is_the_videos_own(part: str) -> None:
    ids = [VIDEO] * 40 + [AUDIO] * 40
    times = [0] * 20 + [25] * 20 + list(range(40))
    sequence = tensors_of(Prompt(ids, [times] * 3), 0)
    one, again, other = (
        run(sequence, PARTS[part], 0.5, 0.5, key=key).keep_mask for key in ("a", "a", "b")
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_selector_that_hears_alone_learns() -> None:
    ids = [VIDEO] * 8 + [AUDIO] * 20
    sequence = tensors_of(Prompt(ids, [[0] * 8 + list(range(20))] * 3), 0)
    selector = random_selector(0)
    [result] = compress_batch(
        [sequence],
        DropShares(0.5, 0.5),
        LAYOUT,
        selector=selector,
        deciders=Deciders(audio="audio"),
    )
    result.embeds.square().sum().backward()
    gradient = selector.v_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(result.embeds, sequence[0][result.keep_mask], rtol=0, atol=0)
