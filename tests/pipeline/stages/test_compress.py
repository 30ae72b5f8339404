"""The compressing stage as a plain callable: every method reaches the rows."""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from omnisift.checkpoint import build_selector, load_backbone, read_selector
from omnisift.compress import drop_shares
from omnisift.compressor import Clip, Pending, VideoCompressor
from omnisift.mini.tiny import write_tiny_model
from pipeline import rows
from pipeline.config import CaptionConfig, CompressionConfig, MediaConfig
from pipeline.settings import cache_ingredients, make_settings
from pipeline.stages.compress import Compress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), selector=True)


def _config(model: Path, method: str) -> CaptionConfig:
    return CaptionConfig(
        source="videos",
        output="captions",
        model=str(model),
        compression=CompressionConfig(method=method),
    )


def _clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    return Clip(
        frames=torch.randint(0, 256, (8, 84, 84, 3), dtype=torch.uint8, generator=generator),
        audio=torch.randn(64_000, generator=generator) * 0.1,
        fps=2.0,
    )


def _row(clip: Clip, key: str) -> dict[str, Any]:
    return {
        "video_key": key,
        "uri": f"videos/{key}.mp4",
        "fps": clip.fps,
        "has_audio": True,
        "frames": clip.frames.numpy().tobytes(),
        "frames_shape": list(clip.frames.shape),
        "audio": clip.audio.numpy().tobytes(),
    }


@pytest.mark.parametrize("method", ["omnisift", "omnizip", "dycoke", "random", "none"])
def test_a_row_is_kept_by_its_method_and_its_own_key(model: Path, method: str) -> None:
    clip, names = _clip(), ["a", "b"]
    selector = read_selector(model, "")
    settings = make_settings(_config(model, method), model, selector, uses_gpu=False)
    block = rows.build([_row(clip, name) for name in names], rows.DECODED)
    kept: pa.Table = Compress(**settings.compress)(block)
    backbone = load_backbone(model, part="towers")
    compressor = VideoCompressor(
        backbone, build_selector(selector, backbone.width), drop_shares(0.25), method=method
    )
    seen = []
    for row, name in zip(kept.to_pylist(), names, strict=True):
        [expected] = compressor([clip], video_keys=[name])
        assert row["error_type"] is None
        assert row["kept_index"] == expected.kept_index.tolist()
        tokens = np.frombuffer(row["tokens"], np.float32).reshape(row["token_shape"])
        assert np.array_equal(tokens, expected.embeds.numpy())
        seen.append(row["kept_index"])
    assert (seen[0] == seen[1]) == (method != "random")


def _stage(model: Path, **settings: Any) -> Compress:
    made = make_settings(
        _config(model, "omnisift"), model, read_selector(model, ""), uses_gpu=False
    )
    return Compress(replace(made.compress["settings"], **settings))


def _of_length(num_frames: int, key: str) -> dict[str, Any]:
    whole = _clip()
    return _row(Clip(whole.frames[:num_frames], whole.audio[: num_frames * 8000], 2.0), key)


LENGTHS = {"a": 8, "b": 2, "c": 6, "d": 8, "e": 4}


def _rows() -> list[dict[str, Any]]:
    return [_of_length(num, key) for key, num in LENGTHS.items()]


def _alone(stage: Compress) -> list[dict[str, Any]]:
    """Compress each row in a call of its own: what a batch has to equal."""
    blocks = [stage(rows.build([row], rows.DECODED)) for row in _rows()]
    return [row for block in blocks for row in block.to_pylist()]


def _assert_equal(actual: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    assert [row["video_key"] for row in actual] == [row["video_key"] for row in expected]
    for row, wanted in zip(actual, expected, strict=True):
        assert row["error_type"] is None, row["error_message"]
        assert row["compress_s"] > 0
        for column in ("kept_index", "positions", "modality", "token_shape", "next_position"):
            assert row[column] == wanted[column], column
        tokens, others = (np.frombuffer(r["tokens"], np.float32) for r in (row, wanted))
        np.testing.assert_allclose(tokens, others, rtol=1e-4, atol=1e-5)


class _Watched:
    """Call the compressor; note the keys of each batch, and fail those that `fails` says."""

    def __init__(self, stage: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[str] = []
        self.poison = ""
        self.most = 9
        self._start = stage.compressor.start
        self._held: list[weakref.ref[torch.Tensor]] = []
        monkeypatch.setattr(stage.compressor, "start", self)

    def __call__(self, clips: Sequence[Clip], *, video_keys: Sequence[str]) -> Pending:
        assert all(held() is None for held in self._held), "a failed try still holds its memory"
        self.batches.append("".join(video_keys))
        if len(clips) > self.most or self.poison in video_keys:
            activations = torch.ones(8)
            self._held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._start(clips, video_keys=video_keys)


def test_a_batch_is_made_to_fit_the_memory_it_may_take(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = _stage(model)
    expected = _alone(roomy)
    sizes = [Clip(_clip().frames[:num], _clip().audio[: num * 8000], 2.0).size for num in (8, 2)]
    budget = roomy.compressor.budget.needed(sizes)
    stage = _stage(model, memory_limit_bytes=budget)
    watched = _Watched(stage, monkeypatch)
    block = stage(rows.build(_rows(), rows.DECODED))
    # As much as the first two: the third makes room for no more, the last two are too much.
    assert watched.batches == ["ab", "c", "d", "e"]
    _assert_equal(block.to_pylist(), expected)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits(
    model: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    stage = _stage(model)
    expected = _alone(stage)
    watched = _Watched(stage, monkeypatch)
    watched.most = most
    block = stage(rows.build(_rows(), rows.DECODED))
    assert watched.batches[0] == "abcde"
    assert "".join(batch for batch in watched.batches if len(batch) <= most) == "abcde"
    _assert_equal(block.to_pylist(), expected)


def test_a_video_that_never_fits_is_one_failed_row(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = _stage(model)
    expected = _alone(stage)
    watched = _Watched(stage, monkeypatch)
    watched.poison = "c"
    given = _rows()
    given[3] |= rows.failed({}, "decode", "truncated", "d is cut")
    block = stage(rows.build(given, rows.DECODED)).to_pylist()
    assert [row["error_type"] for row in block] == [None, None, "out_of_memory", "truncated", None]
    assert block[2]["error_message"] == (
        "videos/c.mp4: frames 6x84x84x3 do not fit the GPU; give the actor more of the GPU "
        "(pools.compress_gpus), or lower media.max_pixels or media.max_frames"
    )
    _assert_equal([block[0], block[1], block[4]], [expected[0], expected[1], expected[4]])


def test_a_video_beyond_the_memory_limit_is_not_tried(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = _stage(model)
    limit = roomy.compressor.budget.needed([Clip(_clip().frames[:6], _clip().audio, 2.0).size])
    stage = _stage(model, memory_limit_bytes=limit)
    watched = _Watched(stage, monkeypatch)
    block = stage(rows.build(_rows(), rows.DECODED)).to_pylist()
    failed = [row["video_key"] for row in block if row["error_type"]]
    assert failed == ["a", "d"]
    assert "".join(watched.batches) == "bce"
    assert block[0]["error_type"] == "out_of_memory"
    assert "compression.memory_limit_bytes allows 0." in block[0]["error_message"]
    assert "raise it, or lower media.max_pixels" in block[0]["error_message"]


def test_two_threads_share_an_actor(model: Path) -> None:
    stage = _stage(model)
    expected = _alone(stage)
    with ThreadPoolExecutor(2) as threads:
        blocks = list(threads.map(stage, [rows.build(_rows(), rows.DECODED)] * 6))
    for block in blocks:
        _assert_equal(block.to_pylist(), expected)


def test_only_windows_that_are_set_change_the_cache(model: Path) -> None:
    selector, config = read_selector(model, ""), _config(model, "omnisift")
    whole, four, eight = (
        cache_ingredients(
            replace(config, media=MediaConfig(window_s=window_s)), model, selector, uses_gpu=False
        )
        for window_s in (0, 4, 8)
    )
    assert "window_s" not in whole  # what was kept before there were windows still counts
    assert {**whole, "window_s": 4} == four
    assert {**whole, "window_s": 8} == eight


def test_each_method_has_a_cache_of_its_own(model: Path) -> None:
    selector = read_selector(model, "")
    one, other = (
        cache_ingredients(_config(model, method), model, selector, uses_gpu=False)
        for method in ("omnisift", "random")
    )
    assert {name for name in one if one[name] != other[name]} == {"method"}
