from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import rows
from pipeline.config import StorageConfig
from pipeline.stages.sink import COUNTS, Sink
from pipeline.storage import Storage


def _video(name: str, answers: dict[str, str | None]) -> dict[str, Any]:
    """Return an answered video; a prompt whose text is None has failed on its own."""
    return {
        "video_key": name,
        "uri": f"s3://b/{name}",
        "size_bytes": 9,
        "etag": "e",
        "attempts": 2,
        "prompts": [{"prompt_id": prompt, "prompt": f"{prompt}?"} for prompt in answers],
        "duration_s": 4.0,
        "num_video_tokens": 100,
        "kept_video_tokens": 25,
        "answer_s": 0.5,
        "cache_hit": True,
        "answers": [
            {
                "prompt_id": prompt,
                "text": text,
                "num_output_tokens": None if text is None else 3,
                "finish_reason": None if text is None else "stop",
                "error_type": "out_of_memory" if text is None else None,
                "error_message": "no memory" if text is None else None,
            }
            for prompt, text in answers.items()
        ],
    }


def _failed(name: str, prompts: list[str]) -> dict[str, Any]:
    video = {**_video(name, dict.fromkeys(prompts)), "answers": None}
    return rows.failed(video, "decode", "truncated", "cut")


def _sink(folder: Path) -> Sink:
    return Sink(Storage(StorageConfig()), str(folder), run_id="run", model="m", fingerprint="f")


def test_a_block_becomes_a_row_a_prompt_and_a_row_a_video(tmp_path: Path) -> None:
    videos = [
        _video("a", {"p": "yes", "q": None}),
        _failed("b", ["p", "q"]),
        _video("c", {"p": ""}),
    ]
    start = datetime.now(UTC)
    counts = _sink(tmp_path)(rows.build(videos, rows.ANSWERED))
    assert counts.schema == COUNTS
    assert counts.to_pylist() == [
        {"num_videos": 3, "num_failed_videos": 1, "num_answers": 5, "num_failed_answers": 3}
    ]
    (answers_file,) = tmp_path.glob("answers-*.parquet")
    (videos_file,) = tmp_path.glob("videos-*.parquet")
    assert len(list(tmp_path.iterdir())) == 2  # nothing unfinished
    answers = pq.read_table(answers_file)
    assert answers.schema.equals(rows.ANSWERS)
    names = ["video_key", "prompt_id", "text", "status", "error_stage", "error_type"]
    assert [tuple(row[name] for name in names) for row in answers.to_pylist()] == [
        ("a", "p", "yes", "ok", None, None),
        ("a", "q", None, "failed", "answer", "out_of_memory"),
        ("b", "p", None, "failed", "decode", "truncated"),
        ("b", "q", None, "failed", "decode", "truncated"),
        ("c", "p", "", "ok", None, None),
    ]
    for row in answers.to_pylist():
        assert row["prompt"] == f"{row['prompt_id']}?"
        assert (row["model"], row["fingerprint"], row["run_id"]) == ("m", "f", "run")
        assert row["attempts"] == 2
        assert start <= row["created_at"] <= datetime.now(UTC)
    found = pq.read_table(videos_file)
    assert found.schema.equals(rows.VIDEOS)
    names = ["video_key", "error_type", "num_prompts", "num_failed_prompts", "kept_video_tokens"]
    assert [tuple(row[name] for name in names) for row in found.to_pylist()] == [
        ("a", None, 2, 1, 25),
        ("b", "truncated", 2, 2, 25),
        ("c", None, 1, 0, 25),
    ]


def test_an_empty_block_writes_nothing(tmp_path: Path) -> None:
    counts = _sink(tmp_path)(rows.ANSWERED.empty_table())
    assert counts.to_pylist()[0]["num_videos"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"answers": []}, {"answers": None}, {"prompts": []}])
def test_an_answer_that_is_lost_on_the_way_is_a_bug(tmp_path: Path, change: dict[str, Any]) -> None:
    video = {**_video("a", {"p": "yes"}), **change}
    with pytest.raises(AssertionError, match="s3://b/a"):
        _sink(tmp_path)(rows.build([video], rows.ANSWERED))
