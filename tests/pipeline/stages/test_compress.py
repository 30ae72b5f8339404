"""The compressing stage as a plain callable: every method reaches the rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from omnisift.checkpoint import build_selector, load_backbone, read_selector
from omnisift.compress import drop_shares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.mini.tiny import write_tiny_model
from pipeline import rows
from pipeline.config import CaptionConfig, CompressionConfig
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


def test_each_method_has_a_cache_of_its_own(model: Path) -> None:
    selector = read_selector(model, "")
    one, other = (
        cache_ingredients(_config(model, method), model, selector, uses_gpu=False)
        for method in ("omnisift", "random")
    )
    assert {name for name in one if one[name] != other[name]} == {"method"}
