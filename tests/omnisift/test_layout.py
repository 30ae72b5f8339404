"""The layout against transformers' own code, and the chunks against a slow loop."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from omnisift.layout import (
    Block,
    Chunks,
    Integers,
    Modality,
    ModelLayout,
    find_chunks,
    num_audio_tokens,
    place_block,
    rows_alike,
)
from tests.omnisift.slow_compress import slow_chunks

LAYOUT = ModelLayout()
TEXT = 100
RANDOM = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# The published values, and what a long video has when 256 frames are spread over it.
SECONDS_PER_GRID = st.sampled_from([0.2, 0.5, 2 / 3, 1.0, 1.3, 2.0, 4.0, 7.5]) | st.builds(
    lambda duration_ms: 2 / (256 / (duration_ms / 1000)), st.integers(20_000, 7_200_000)
)
# 0 twice: silent videos are common
AUDIO_TOKENS = st.sampled_from([0, 0, 1, 49, 50, 51]) | st.integers(1, 400)


@pytest.fixture(scope="module")
def thinker() -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Make transformers' model without memory: only its positions are asked for."""
    # these two come from the checkpoint's file alone
    marks: dict[str, Any] = {
        "vision_start_token_id": LAYOUT.vision_bos_id,
        "vision_end_token_id": LAYOUT.vision_eos_id,
    }
    config = Qwen2_5OmniThinkerConfig(
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16},
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2},
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        **marks,
    )
    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(config)


def rope_index(
    thinker: Any,
    ids: Integers,
    grid: tuple[int, int, int],
    seconds_per_grid: float,
    audio_tokens: int,
) -> tuple[Integers, int]:
    """Return transformers' positions [3, L] and the position behind the last token."""
    frames, height, width = grid
    tensor = torch.from_numpy(ids)[None]
    positions, deltas = thinker.get_rope_index(
        tensor,
        None,
        torch.tensor([[frames, 2 * height, 2 * width]]),
        torch.ones_like(tensor),
        audio_tokens > 0,
        # four mel frames make one token
        torch.tensor([4 * audio_tokens]) if audio_tokens else None,
        torch.tensor([seconds_per_grid]),
    )
    return positions[:, 0].numpy(), int(deltas[0, 0]) + len(ids)


def processor_ids(
    grid: tuple[int, int, int], seconds_per_grid: float, audio_tokens: int
) -> list[int]:
    """Return the block's ids as transformers' processor writes them, one letter a token."""
    frames, height, width = grid
    letters = {
        "V": LAYOUT.video_token_id,
        "A": LAYOUT.audio_token_id,
        "b": LAYOUT.audio_bos_id,
        "e": LAYOUT.audio_eos_id,
    }
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        video_token="V",
        audio_token="A",
        audio_bos_token="b",
        audio_eos_token="e",
    )
    processor.get_chunked_index = lambda *arguments: Qwen2_5OmniProcessor.get_chunked_index(
        processor, *arguments
    )
    text = Qwen2_5OmniProcessor.replace_video_with_audio_token(
        processor,
        {
            "video_grid_thw": np.array([[frames, 2 * height, 2 * width]]),
            "video_second_per_grid": [seconds_per_grid],
        },
        0,
        {"num_audio_tokens": np.array([audio_tokens])},
        0,
        position_id_per_seconds=LAYOUT.positions_per_second,
        seconds_per_chunk=LAYOUT.seconds_per_chunk,
    )
    inner = [letters[letter] for letter in text]
    return [LAYOUT.vision_bos_id, *inner, LAYOUT.vision_eos_id]


def rounds_alike(grids: int, seconds_per_grid: float) -> bool:
    """Return whether float64 (processor) and float32 (positions) find the same 2 s pieces."""
    exact = np.arange(grids) * seconds_per_grid * 25
    single = np.arange(grids, dtype=np.float32) * np.float32(seconds_per_grid) * np.float32(25)
    return bool(np.array_equal(exact // 50, single.astype(np.int64) // 50))


def place(grid: tuple[int, int, int], seconds_per_grid: float, audio_tokens: int) -> Block:
    return place_block(
        LAYOUT,
        grids=grid[0],
        height=grid[1],
        width=grid[2],
        seconds_per_grid=seconds_per_grid,
        audio_tokens=audio_tokens,
    )


GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))


@RANDOM
@given(
    grid=GRIDS,
    seconds_per_grid=SECONDS_PER_GRID,
    audio_tokens=AUDIO_TOKENS,
    before=st.integers(1, 20),
    after=st.integers(1, 20),
)
def test_positions_equal_transformers_behind_any_text(
    thinker: Any,
    grid: tuple[int, int, int],
    seconds_per_grid: float,
    audio_tokens: int,
    before: int,
    after: int,
) -> None:
    block = place(grid, seconds_per_grid, audio_tokens)
    ids = np.concatenate([[TEXT] * before, block.ids, [TEXT] * after])
    expected, behind = rope_index(thinker, ids, grid, seconds_per_grid, audio_tokens)
    actual = np.concatenate(
        [
            np.broadcast_to(np.arange(before), (3, before)),
            block.positions + before,
            np.broadcast_to(np.arange(after) + before + block.next_position, (3, after)),
        ],
        axis=1,
    )
    assert np.array_equal(actual, expected)
    # transformers counts on from the highest position, which may be inside the block
    assert behind == max(actual.max() + 1, before + block.next_position + after)


@RANDOM
@given(grid=GRIDS, seconds_per_grid=SECONDS_PER_GRID, audio_tokens=AUDIO_TOKENS.filter(bool))
def test_ids_stand_in_the_processors_order(
    grid: tuple[int, int, int], seconds_per_grid: float, audio_tokens: int
) -> None:
    block = place(grid, seconds_per_grid, audio_tokens)
    expected = processor_ids(grid, seconds_per_grid, audio_tokens)
    assert len(block.ids) == len(expected)
    if rounds_alike(grid[0], seconds_per_grid):
        assert block.ids.tolist() == expected


def test_where_transformers_contradicts_itself_ids_follow_the_positions(thinker: Any) -> None:
    """The processor orders tokens in float64, the model places them in float32.

    At 1.3 s a grid, grid 180 starts at 5850 = 117 * 50 in float64 but at 5849.9995 in float32,
    which is cut to 5849: another piece, so transformers gives tokens each other's positions.
    """
    grid, seconds_per_grid, audio_tokens = (181, 1, 2), 1.3, 5900
    assert not rounds_alike(grid[0], seconds_per_grid)
    block = place(grid, seconds_per_grid, audio_tokens)
    assert block.ids.tolist() != processor_ids(grid, seconds_per_grid, audio_tokens)
    ids = np.concatenate([[TEXT], block.ids, [TEXT]])
    expected, _ = rope_index(thinker, ids, grid, seconds_per_grid, audio_tokens)
    assert np.array_equal(block.positions + 1, expected[:, 1:-1])
    # whose position is whose: an audio token's three are equal, a grid's two columns are 1 and 2
    video = block.positions[:, block.ids == LAYOUT.video_token_id]
    assert video[1:].T.tolist() == [[1, 1], [1, 2]] * 181
    audio = block.positions[:, block.ids == LAYOUT.audio_token_id]
    assert np.array_equal(audio, np.broadcast_to(np.arange(1, audio_tokens + 1), audio.shape))


@RANDOM
@given(grid=GRIDS, seconds_per_grid=SECONDS_PER_GRID, audio_tokens=AUDIO_TOKENS)
def test_modality_names_what_each_id_is(
    grid: tuple[int, int, int], seconds_per_grid: float, audio_tokens: int
) -> None:
    block = place(grid, seconds_per_grid, audio_tokens)
    kinds = {LAYOUT.video_token_id: Modality.VIDEO, LAYOUT.audio_token_id: Modality.AUDIO}
    assert block.modality.tolist() == [kinds.get(id_, Modality.TEXT) for id_ in block.ids.tolist()]
    assert int((block.modality == Modality.VIDEO).sum()) == grid[0] * grid[1] * grid[2]
    assert int((block.modality == Modality.AUDIO).sum()) == audio_tokens


def test_a_silent_block_in_closed_form() -> None:
    block = place((2, 1, 2), 1.0, 0)
    bos, video, eos = LAYOUT.vision_bos_id, LAYOUT.video_token_id, LAYOUT.vision_eos_id
    assert block.ids.tolist() == [bos, video, video, video, video, eos]
    assert block.positions.tolist() == [
        [0, 1, 1, 26, 26, 27],
        [0, 1, 1, 1, 1, 27],
        [0, 1, 2, 1, 2, 27],
    ]
    assert block.next_position == 28


@pytest.mark.parametrize("field", ["grids", "height", "width", "audio_tokens"])
def test_a_block_without_video_is_refused(field: str) -> None:
    size = {"grids": 1, "height": 1, "width": 1, "audio_tokens": 1}
    size[field] = -1 if field == "audio_tokens" else 0
    with pytest.raises(ValueError, match="at least one video token"):
        place_block(LAYOUT, seconds_per_grid=1.0, **size)


def test_audio_tokens_equal_the_towers_output_lengths() -> None:
    tower: Any = None  # the formula reads nothing of it
    mel_frames: Any = torch.arange(3001)
    _, expected = Qwen2_5OmniAudioEncoder._get_feat_extract_output_lengths(tower, mel_frames)
    assert [num_audio_tokens(frames) for frames in range(3001)] == expected.tolist()


def test_the_layout_is_read_from_a_thinker_configuration(thinker: Any) -> None:
    assert ModelLayout.of(thinker.config) == LAYOUT


def rows(indices: Integers, counts: Integers) -> list[list[int]]:
    """Return the real part of padded rows."""
    pairs = zip(indices.tolist(), counts.tolist(), strict=True)
    return [row[:count] for row, count in pairs]


def unpadded(chunks: Chunks) -> list[tuple[list[int], list[int], list[int]]]:
    return list(
        zip(
            rows(chunks.first, chunks.num_first),
            rows(chunks.second, chunks.num_second),
            rows(chunks.audio, chunks.num_audio),
            strict=True,
        )
    )


TOKENS = st.lists(
    st.tuples(
        st.sampled_from([TEXT, LAYOUT.video_token_id, LAYOUT.audio_token_id]), st.integers(0, 12)
    ),
    max_size=40,
)


@RANDOM
@given(sequences=st.lists(TOKENS, min_size=1, max_size=3))
def test_chunks_equal_the_slow_loop(sequences: list[list[tuple[int, int]]]) -> None:
    """Any ids at any times, several sequences laid end to end."""
    expected, arrays, offset = [], [], 0
    for tokens in sequences:
        ids, times = [id_ for id_, _ in tokens], [time for _, time in tokens]
        for chunk in slow_chunks(
            ids, times, video_token_id=LAYOUT.video_token_id, audio_token_id=LAYOUT.audio_token_id
        ):
            parts = (
                [i + offset for i in part] for part in (chunk.first, chunk.second, chunk.audio)
            )
            expected.append(tuple(parts))
        positions = np.array([times, [0] * len(times), [0] * len(times)], dtype=np.int64)
        arrays.append((np.array(ids, dtype=np.int64), positions))
        offset += len(tokens)
    actual = find_chunks(
        arrays, video_token_id=LAYOUT.video_token_id, audio_token_id=LAYOUT.audio_token_id
    )
    assert unpadded(actual) == expected


@RANDOM
@given(grid=GRIDS, seconds_per_grid=SECONDS_PER_GRID, audio_tokens=AUDIO_TOKENS)
def test_the_chunks_of_a_placed_block_hold_each_media_token_once(
    grid: tuple[int, int, int], seconds_per_grid: float, audio_tokens: int
) -> None:
    block = place(grid, seconds_per_grid, audio_tokens)
    chunks = find_chunks(
        [(block.ids, block.positions)],
        video_token_id=LAYOUT.video_token_id,
        audio_token_id=LAYOUT.audio_token_id,
    )
    inside = [index for parts in unpadded(chunks) for part in parts for index in part]
    assert sorted(inside) == np.flatnonzero(block.modality != Modality.TEXT).tolist()


@RANDOM
@given(
    counts=st.lists(st.integers(1, 60) | st.sampled_from([2, 50, 1100, 7500]), max_size=200),
)
def test_rows_padded_together_are_at_most_twice_what_they_hold(counts: list[int]) -> None:
    groups = [group.tolist() for group in rows_alike(np.array(counts, dtype=np.int64))]
    assert sorted(row for group in groups for row in group) == list(range(len(counts)))
    for group in groups:
        held = [counts[row] for row in group]
        assert group == sorted(group)
        assert len(held) * max(held) <= 2 * sum(held)
    # Each takes all rows of half its longest and more: none but the first is as long as that.
    assert len(groups) <= math.log2(max(counts, default=1)) + 1
    if counts and len(counts) * max(counts) <= 2 * sum(counts):
        assert len(groups) == 1


@pytest.mark.parametrize("last", [2, 25, 50, 62, 100])
def test_usual_windows_are_padded_together(last: int) -> None:
    """Two seconds each, but for the last one of a clip."""
    assert len(rows_alike(np.array([50] * 15 + [last], dtype=np.int64))) == 1
