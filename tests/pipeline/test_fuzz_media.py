"""A hundred broken media files through the decode stage; `make chaos` sends thousands."""

import math
from pathlib import Path

import pyarrow as pa

from pipeline import rows
from pipeline.boundary import Roots
from pipeline.config import DecodeConfig, MediaConfig, StorageConfig
from pipeline.retry import COSTLY, FINAL
from pipeline.stages.decode import Decode
from tests.chaos.mutations import mutations, seeds

MEDIA = MediaConfig(min_pixels=56 * 56, max_pixels=112 * 112)


def test_every_mutant_is_a_row_with_frames_or_with_an_error_type(tmp_path: Path) -> None:
    good = seeds(tmp_path / "seeds")
    given = []
    for name, content in [*good.items(), *mutations(good, 100, seed=0)]:
        path = tmp_path / name
        path.write_bytes(content)
        identity = {"video_key": name, "uri": str(path), "size_bytes": len(content), "etag": ""}
        given.append({**identity, "prompts": [], "attempts": 1})
    limits = DecodeConfig(probe_s=20, deadline_s=20, memory_limit_bytes=1 << 30)
    stage = Decode(MEDIA, limits, StorageConfig(), Roots((str(tmp_path),), None))
    blocks = pa.concat_tables(stage(rows.build(given, rows.IDENTITY)))
    out = list(rows.iterate(blocks))
    stage.close()

    assert [row["video_key"] for row in out] == [row["video_key"] for row in given]
    assert [row["error_message"] for row in out[: len(good)]] == [None] * len(good)
    kinds = {row["error_type"] for row in out if row["error_type"]}
    assert kinds <= FINAL | COSTLY | {"too_large", "too_many_streams"}
    assert {"not_a_video", "no_video_stream", "decode_error"} <= kinds  # they are broken indeed
    for row in out:
        if row["error_type"]:
            assert row["uri"] in row["error_message"]
            assert row["frames"] is None
        else:
            assert len(row["frames"]) == math.prod(row["frames_shape"]) > 0
            assert row["duration_s"] >= 0
