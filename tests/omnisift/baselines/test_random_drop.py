"""Random against a slow loop, and its uniformity against the closed form."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisift.baselines.random_drop import drop_at_random
from omnisift.compress import Compressed, Sequence3d
from omnisift.compression_plan import DropShares
from tests.omnisift.baselines.layouts import (
    AUDIO,
    LAYOUT,
    PROMPTS,
    RANDOM,
    SHARES,
    TEXT,
    VIDEO,
    Prompt,
    tensors_of,
)
from tests.omnisift.slow_compress import slow_chunks


def fast(
    sequences: list[Sequence3d], keys: list[str], video_drop: float, audio_drop: float
) -> list[Compressed]:
    return drop_at_random(sequences, DropShares(video_drop, audio_drop), LAYOUT, video_keys=keys)


def slow_keep(prompt: Prompt, key: str, video_drop: float, audio_drop: float) -> list[bool]:
    """Drop each chunk's tokens in the order of their eight bytes, the highest first."""
    keep = [True] * len(prompt.ids)
    chunks = slow_chunks(
        prompt.ids, prompt.positions[0], video_token_id=VIDEO, audio_token_id=AUDIO
    )
    for number, chunk in enumerate(chunks):
        members = chunk.first + chunk.second + chunk.audio
        stream = hashlib.shake_256(f"{key}/{number}".encode()).digest(8 * len(members))
        drawn = {
            index: int.from_bytes(stream[8 * i : 8 * i + 8], "little")
            for i, index in enumerate(members)
        }
        from_video = int(len(chunk.first) * video_drop) + int(len(chunk.second) * video_drop)
        for pool, count in (
            (chunk.first + chunk.second, from_video),
            (chunk.audio, int(len(chunk.audio) * audio_drop)),
        ):
            for index in sorted(pool, key=lambda index: -drawn[index])[:count]:
                keep[index] = False
    return keep


@RANDOM
@given(prompt=PROMPTS, video_drop=SHARES, audio_drop=SHARES, key=st.text(max_size=5))
def test_equals_the_slow_loop(
    prompt: Prompt, video_drop: float, audio_drop: float, key: str
) -> None:
    sequence = tensors_of(prompt, 0)
    [result] = fast([sequence], [key], video_drop, audio_drop)
    assert result.keep_mask.tolist() == slow_keep(prompt, key, video_drop, audio_drop)
    assert torch.equal(result.embeds, sequence[0][result.keep_mask])
    assert torch.equal(result.kept_index, result.keep_mask.nonzero().flatten())
    assert result.kept_index.tolist() == result.keep_mask.nonzero().flatten().tolist()


@RANDOM
@given(prompts=st.lists(PROMPTS, min_size=2, max_size=3), video_drop=SHARES, audio_drop=SHARES)
def test_a_batch_equals_its_videos_alone(
    prompts: list[Prompt], video_drop: float, audio_drop: float
) -> None:
    sequences = [tensors_of(prompt, seed) for seed, prompt in enumerate(prompts)]
    keys = [f"video {number}" for number in range(len(prompts))]
    together = fast(sequences, keys, video_drop, audio_drop)
    for sequence, key, result in zip(sequences, keys, together, strict=True):
        [alone] = fast([sequence], [key], video_drop, audio_drop)
        assert torch.equal(alone.keep_mask, result.keep_mask)
        assert torch.equal(alone.embeds, result.embeds)


def _two_chunks(text: int = 2) -> Prompt:
    ids = [TEXT] * text + ([VIDEO] * 12 + [AUDIO] * 10) * 2
    times = [0] * text
    for chunk in range(2):
        times += [50 * chunk] * 6 + [50 * chunk + 25] * 6
        times += [50 * chunk + 5 * i for i in range(10)]
    return Prompt(ids, [times] * 3)


def test_every_token_is_dropped_equally_often() -> None:
    sequence, runs = tensors_of(_two_chunks(), 0), 4000
    kept = torch.zeros(len(sequence[1]))
    for number in range(runs):
        [result] = fast([sequence], [f"key {number}"], 0.5, 0.3)
        kept += result.keep_mask
    for token_id, share in ((VIDEO, 0.5), (AUDIO, 0.7)):
        deviation = (kept[sequence[1] == token_id] / runs - share).abs().max()
        assert deviation < 4.5 * math.sqrt(share * (1 - share) / runs)


def test_the_key_decides_and_the_text_around_does_not() -> None:
    [one] = fast([tensors_of(_two_chunks(2), 0)], ["a"], 0.5, 0.5)
    [prefixed] = fast([tensors_of(_two_chunks(5), 1)], ["a"], 0.5, 0.5)
    [other] = fast([tensors_of(_two_chunks(2), 0)], ["b"], 0.5, 0.5)
    assert torch.equal(one.keep_mask[2:], prefixed.keep_mask[5:])
    assert not torch.equal(one.keep_mask, other.keep_mask)
    first, second = one.keep_mask[2:].chunk(2)
    assert not torch.equal(first, second)  # the chunk's index is part of the seed


@pytest.mark.parametrize("keys", [[], ["a", "b"]])
def test_each_video_needs_its_key(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="1 sequences need as many video_keys"):
        fast([tensors_of(_two_chunks(), 0)], keys, 0.5, 0.5)
