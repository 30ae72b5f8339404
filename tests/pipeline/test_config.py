from typing import Any

import pytest

from omnisift.methods import METHODS
from pipeline import cli
from pipeline.config import CaptionConfig

PLACES = {"source": "s3://bucket/videos", "output": "s3://bucket/captions"}


def load(**settings: Any) -> CaptionConfig:
    """Return the configuration with `settings`, whose keys hold `__` for a dot."""
    given = {**PLACES, **settings}
    return cli.load(CaptionConfig, [f"{k.replace('__', '.')}={v}" for k, v in given.items()])


WINDOWS = (
    "0, or a multiple of 2 s (a chunk) with an even number of frames at media.fps, at most 2 s "
    "below media.max_audio_s"
)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("source", "", "a prefix or a manifest, got ''"),
        ("output", "", "a prefix to write to, got ''"),
        ("model", "", "a folder or a hub id, got ''"),
        ("media.fps", "0", "positive, got 0.0"),
        ("media.fps", "-2", "positive, got -2.0"),
        ("media.fps", ".nan", "positive, got nan"),
        ("media.max_frames", "7", "an even number, at least 2, got 7"),
        ("media.max_frames", "0", "an even number, at least 2, got 0"),
        ("media.min_pixels", "783", "at least 784, got 783"),
        ("media.max_pixels", "100351", "at least media.min_pixels (100352), got 100351"),
        ("media.max_audio_s", "0", "in (0, 300], got 0.0"),
        ("media.max_audio_s", "300.1", "in (0, 300], got 300.1"),
        ("media.window_s", "-2", f"{WINDOWS}, got -2.0"),
        ("media.window_s", "5", f"{WINDOWS}, got 5.0"),
        ("media.window_s", "300", f"{WINDOWS}, got 300.0"),
        ("media.reader", "cv2", "'pyav' or 'decord', got 'cv2'"),
        ("media.timestamps", "wrong", "'seconds' or 'nominal', got 'wrong'"),
        ("decode.deadline_s", "0", "positive, got 0.0"),
        ("decode.memory_limit_bytes", "0", "positive, got 0"),
        ("decode.max_size_bytes", "-1", "positive, got -1"),
        ("decode.max_source_pixels", "0", "positive, got 0"),
        (
            "compression.method",
            "fastv",
            f"one of {', '.join(METHODS)}, got 'fastv'",
        ),
        ("compression.retain", "0", "in (0, 1], got 0.0"),
        ("compression.retain", "1.5", "in (0, 1], got 1.5"),
        ("compression.batch_videos", "0", "at least 1, got 0"),
        ("compression.memory_limit_bytes", "5", "at least 536870912 (half a GiB), got 5"),
        ("compression.video_drop", "-0.1", "in [0, 1] or null, got -0.1"),
        ("compression.audio_drop", "1.1", "in [0, 1] or null, got 1.1"),
        ("cache.codec", "float16", "auto, float32, bfloat16, int8, got 'float16'"),
        ("cache.videos_per_file", "0", "at least 1, got 0"),
        ("answer.prompt", "  ", "not empty, got '  '"),
        ("answer.max_new_tokens", "0", "at least 1, got 0"),
        ("answer.batch_videos", "0", "at least 1, got 0"),
        ("pools.decode_actors", "-1", "0 or more, got -1"),
        ("pools.compress_actors", "-1", "0 or more, got -1"),
        ("pools.answer_actors", "-1", "0 or more, got -1"),
        ("pools.cache_actors", "-1", "0 or more, got -1"),
        ("pools.decode_cpus", "0", "positive, got 0.0"),
        ("pools.compress_cpus", "0", "positive, got 0.0"),
        ("pools.answer_cpus", "-1", "positive, got -1.0"),
        ("pools.cache_cpus", "0", "positive, got 0.0"),
        ("pools.compress_gpus", "-5", "-1, 0 to 1, or a whole number, got -5.0"),
        ("pools.compress_gpus", "-0.5", "-1, 0 to 1, or a whole number, got -0.5"),
        ("pools.answer_gpus", "1.5", "-1, 0 to 1, or a whole number, got 1.5"),
        ("pools.answer_gpus", "inf", "-1, 0 to 1, or a whole number, got inf"),
        ("storage.attempts", "0", "at least 1, got 0"),
        ("storage.timeout_s", "0", "positive, got 0.0"),
    ],
)
def test_a_broken_rule_is_refused_with_field_rule_and_value(
    capsys: pytest.CaptureFixture[str], name: str, value: str, rule: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        load(**{name: value})
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {name} must be {rule}\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("media.max_frames", "2"),
        ("media.min_pixels", "784"),
        ("media.max_pixels", "100352"),
        ("media.max_audio_s", "300"),
        ("media.window_s", "298"),
        ("media.timestamps", "nominal"),
        ("compression.method", "omnizip"),
        ("compression.retain", "1"),
        ("compression.video_drop", "0"),
        ("compression.audio_drop", "1"),
        ("cache.codec", "bfloat16"),
        ("pools.decode_cpus", "0.01"),
        ("pools.compress_gpus", "0"),
        ("pools.compress_gpus", "-1"),
        ("pools.answer_gpus", "1"),
        ("pools.answer_gpus", "2"),
    ],
)
def test_the_edge_of_a_rule_is_inside(name: str, value: str) -> None:
    group, _, key = name.partition(".")
    held = getattr(getattr(load(**{name: value}), group), key)
    assert str(held) in (value, f"{value}.0")


def test_the_cache_lies_under_the_output_unless_it_is_placed() -> None:
    assert load(output="s3://bucket/captions/").cache_root == "s3://bucket/captions/cache"
    assert load(cache__path="/data/cache/").cache_root == "/data/cache"


def test_a_named_drop_share_overrides_retain_for_its_modality_alone() -> None:
    nominal = load(compression__retain=0.25).compression.shares
    mixed = load(compression__retain=0.25, compression__video_drop=0.9).compression.shares
    assert (mixed.video, mixed.audio) == (0.9, nominal.audio)


def test_the_method_none_drops_nothing_whatever_the_shares() -> None:
    given = {"compression__method": "none", "compression__retain": 0.25}
    shares = load(**given, compression__audio_drop=0.5).compression.shares
    assert (shares.video, shares.audio) == (0.0, 0.0)


def test_every_key_tells_what_it_means() -> None:
    rows = cli.key_table(CaptionConfig).splitlines()[2:]
    assert len(rows) > 30
    assert [row for row in rows if row.rstrip(" |").endswith("`")] == []
