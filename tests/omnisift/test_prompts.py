"""The positions around kept tokens, and where a text ends, against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisift.checkpoint import load_tokenizer
from omnisift.compressor import KeptTokens, TooLongError
from omnisift.layout import ModelLayout, place_block
from omnisift.mini.tiny import write_tiny_model
from omnisift.prompts import (
    BadTokensError,
    PromptText,
    Sampling,
    check_kept,
    check_room,
    prompt_positions,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> PromptText:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return PromptText(load_tokenizer(folder), "You see and hear.")


@settings(max_examples=50, deadline=None)
@given(
    grids=st.integers(1, 7),
    side=st.integers(1, 4),
    audio=st.integers(0, 120),
    before=st.integers(0, 20),
    after=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_positions_are_text_block_text(
    grids: int, side: int, audio: int, before: int, after: int, seed: int
) -> None:
    block = place_block(
        ModelLayout(),
        grids=grids,
        height=side,
        width=side,
        seconds_per_grid=1.0,
        audio_tokens=audio,
    )
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(rng.random(len(block.ids)) < 0.4)
    placed = prompt_positions(
        block.positions[:, kept].astype(np.int32),
        next_position=block.next_position,
        num_before=before,
        num_after=after,
    )
    expected = [[i] * 3 for i in range(before)]
    expected += [  # where the whole block would have put them
        [before + int(block.positions[axis, token]) for axis in range(3)] for token in kept
    ]
    expected += [[before + block.next_position + i] * 3 for i in range(after)]
    assert placed.T.tolist() == expected


def test_an_answer_ends_at_an_end_mark(text: PromptText) -> None:
    ids = text._encode(" Two cats. ")
    assert text.finish([*ids, text.im_end, *ids]) == ("Two cats.", len(ids), True)
    assert text.finish(ids) == ("Two cats.", len(ids), False)
    assert text.finish([text.ends[1]]) == ("", 0, True)


@settings(max_examples=100, deadline=None)
@given(
    said=st.text("ab.é", min_size=0, max_size=12),
    stop=st.lists(st.text("ab.é", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_an_answer_ends_in_front_of_the_first_stop_text(
    text: PromptText, said: str, stop: list[str]
) -> None:
    ids = text._encode(said)  # a token a byte
    found, length, ended = text.finish(ids, stop)
    ends = [i for i in range(len(said) + 1) if any(said[:i].endswith(word) for word in stop)]
    if not ends:
        assert (found, length, ended) == (said.strip(), len(ids), False)
        return
    complete = said[: ends[0]]
    starts = [complete.index(word) for word in stop if word in complete]
    assert found == complete[: min(starts)].strip()
    assert length == len(complete.encode())
    assert ended


def _kept(num_tokens: int, width: int, num_positions: int) -> KeptTokens:
    return KeptTokens(
        embeds=torch.zeros(num_tokens, width),
        positions=np.zeros((3, num_positions), np.int32),
        modality=np.ones(num_tokens, np.uint8),
        next_position=num_tokens,
        kept_index=np.arange(num_tokens, dtype=np.int32),
        num_video_tokens=num_tokens,
        num_audio_tokens=0,
    )


def test_tokens_that_do_not_fit_are_refused_with_the_numbers() -> None:
    check_kept(_kept(4, 8, 4), 8)
    for kept, message in (
        (_kept(4, 7, 4), r"kept tokens are \[4, 7\], the model reads \[n, 8\]"),
        (_kept(4, 8, 5), r"positions are \[3, 5\] for 4 tokens"),
        (_kept(0, 8, 0), "no kept tokens"),
    ):
        with pytest.raises(BadTokensError, match=message):
            check_kept(kept, 8)


def test_a_prompt_may_end_where_the_model_does() -> None:
    given_room = {"next_position": 90, "num_after": 4, "max_positions": 100}
    check_room(**given_room, max_new_tokens=6)
    with pytest.raises(TooLongError, match=r"7 answer tokens end at position 101, .* made for 100"):
        check_room(**given_room, max_new_tokens=7)


@pytest.mark.parametrize(
    "nonsense", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"stop": ("",)}]
)
def test_sampling_refuses_nonsense(nonsense: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(nonsense))):
        Sampling(**nonsense)  # type: ignore[arg-type]
