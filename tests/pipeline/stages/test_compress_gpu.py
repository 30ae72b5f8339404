"""The compressing stage on a GPU that has less memory than it is asked for."""

import gc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnisift.audio_selection import AudioSelector
from omnisift.codec import decode
from omnisift.compress import drop_shares
from omnisift.compressor import Clip
from omnisift.measure.random_model import published_config, random_model
from omnisift.mini.files import SPECIAL_TOKENS, thinker_config, write_model
from pipeline import rows
from pipeline.stages.compress import Compress, CompressSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FRAMES = (16, 448, 448, 3)  # 8192 patches: eight videos are one slice of the vision tower
AMPLE = 64 << 30  # nothing is split by its estimate


def write_small_model(folder: Path) -> Path:
    """Write a model as wide as the published one, with few layers and words, and a selector."""
    sizes = published_config().to_dict()
    sizes["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    sizes["audio_config"]["encoder_layers"] = 2
    sizes["text_config"] |= {"vocab_size": 64, "pad_token_id": 0}
    sizes["pad_token_id"] = 0
    config: Any = thinker_config(sizes, {name: place for place, name in enumerate(SPECIAL_TOKENS)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(config, device, llm_layers=0)
    return write_model(folder, model, AudioSelector(config.text_config.hidden_size))


def make_stage(model: Path, limit_bytes: int, device: str = "cuda") -> Compress:
    """Start the stage as an actor would."""
    return Compress(
        CompressSettings(
            model=str(model),
            revision="main",
            selector="",
            seed=0,
            method="omnisift",
            shares=drop_shares(0.25),
            nominal_timestamps=False,
            memory_limit_bytes=limit_bytes,
            codec="bfloat16",
            device=device,
        )
    )


def make_rows(count: int) -> list[dict[str, Any]]:
    """Return decoded videos of 8 s with sound."""
    videos = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        videos.append(
            {
                "video_key": str(seed),
                "uri": f"videos/{seed}.mp4",
                "fps": 2.0,
                "has_audio": True,
                "frames": generator.integers(0, 256, FRAMES, dtype=np.uint8).tobytes(),
                "frames_shape": list(FRAMES),
                "audio": generator.normal(0, 0.1, 8 * 16_000).astype(np.float32).tobytes(),
            }
        )
    return videos


def compress(stage: Compress, videos: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one call."""
    return list(rows.iterate(stage(rows.build(videos, rows.DECODED))))


def assert_same(actual: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Compare within the rounding of other batches, by which a near tie may fall otherwise."""
    for row, wanted in zip(actual, expected, strict=True):
        assert row["video_key"] == wanted["video_key"]
        assert row["error_type"] is None, row["error_message"]
        common, here, there = np.intersect1d(
            row["kept_index"], wanted["kept_index"], return_indices=True
        )
        assert len(common) >= 0.99 * len(wanted["kept_index"]) > 0
        mine, others = (
            decode(each["tokens"], "bfloat16", tuple(each["token_shape"])).double()[place]
            for each, place in ((row, here), (wanted, there))
        )
        assert float((mine - others).norm() / others.norm()) < 0.02


def _clean() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _reserved_for(stage: Compress, videos: Sequence[dict[str, Any]]) -> int:
    """Return the memory that a call takes of the GPU at its most, weights included."""
    _clean()
    compress(stage, videos)
    return torch.cuda.max_memory_reserved()


def _allow(limit_bytes: int) -> None:
    """Let this process have so much of the GPU: more is refused as on a GPU that is full."""
    _clean()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def _all_of_the_gpu() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("_all_of_the_gpu")
def test_a_full_gpu_halves_batches_and_loses_no_video(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, videos = make_stage(model, AMPLE), make_rows(8)
    expected = [compress(stage, [video])[0] for video in videos]
    one, two, four = (_reserved_for(stage, videos[:count]) for count in (1, 2, 4))
    assert two < 0.8 * four, f"{one}, {two} and {four} bytes"

    caplog.set_level(logging.WARNING, logger="pipeline.stages.compress")
    _allow((two + four) // 2)
    assert_same(compress(stage, videos), expected)
    said = [record for record in caplog.records if record.name == "pipeline.stages.compress"]
    tried = [record.args[0] for record in said if isinstance(record.args, tuple)]
    assert tried == [8, 4, 4]
    assert torch.cuda.max_memory_reserved() <= (two + four) // 2

    caplog.clear()
    _clean()
    _allow((torch.cuda.memory_reserved() + one) // 2)
    failed = compress(stage, videos[:3])
    assert [row["error_type"] for row in failed] == ["out_of_memory"] * 3
    assert "frames 16x448x448x3 do not fit the GPU" in failed[1]["error_message"]

    torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(compress(stage, videos), expected)  # the actor lives on


def test_batches_stay_within_the_least_memory_that_may_be_allowed(model: Path) -> None:
    videos, limit = make_rows(8), 512 << 20
    expected = compress(make_stage(model, AMPLE), videos)
    stage = make_stage(model, limit)
    size = Clip(torch.empty(FRAMES, dtype=torch.uint8), torch.empty(8 * 16_000), 2.0).size
    batches = [len(places) for places in stage.compressor.budget.split([size] * 8)]
    assert max(batches) < 8
    compress(stage, videos[:1])  # compiles
    _clean()
    weights = torch.cuda.memory_allocated()
    assert_same(compress(stage, videos), expected)
    above = torch.cuda.max_memory_allocated() - weights
    assert above <= limit, f"batches of {batches} took {above} bytes of {limit}"
