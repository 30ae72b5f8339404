"""A repeated clip, as its decoder sees it, against the short one."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DecodeConfig, MediaConfig
from pipeline.film import decode_file
from pipeline.testing.clips import encode, repeat

MEDIA = MediaConfig(fps=2.0, min_pixels=56 * 56, max_pixels=112 * 112)


# Of the first a turn's sound ends with its pictures (120 packets), of the second it lasts longer.
@pytest.mark.parametrize("num_frames", [64, 50])
def test_a_repeated_clip_shows_and_sounds_the_same_each_turn(
    tmp_path: Path, num_frames: int
) -> None:
    span_s = num_frames / 25
    encode(tmp_path / "short.mp4", num_frames=num_frames, key_every=num_frames, sound="aac")
    long = repeat(tmp_path / "short.mp4", tmp_path / "long.mp4", 3 * span_s)
    decoded = decode_file(long, MEDIA, DecodeConfig())
    assert decoded.duration_s == pytest.approx(3 * span_s, abs=0.05)
    assert len(decoded.audio) / 16_000 == pytest.approx(3 * span_s, abs=0.1)
    if num_frames == 50:  # a frame each 0.5 s falls on the same pictures in each turn of 2 s
        turns = decoded.frames.reshape(3, 4, *decoded.frames.shape[1:])
        assert not np.array_equal(turns[0, 0], turns[0, 3])
        for turn in turns[1:]:
            assert np.array_equal(turn, turns[0])
