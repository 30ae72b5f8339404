import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from omnisift.answer import Answer as Text
from omnisift.engines.interface import AskedVideo, Refusal
from pipeline import rows, spilled_rows
from pipeline.config import StorageConfig
from pipeline.report import Report, make_report, render, write_report
from pipeline.stages.answer import Answer, _SharedClock
from pipeline.stages.sink import Sink
from pipeline.stages.source import WorkCounts
from pipeline.storage import Storage

STORAGE = Storage(StorageConfig())


class _NoEngine:
    """Stand in for a model that is asked nothing."""

    def __call__(self, videos: Sequence[AskedVideo]) -> list[list[Text | Refusal]]:
        assert not videos
        return []

    def close(self) -> None: ...


ANSWER = object.__new__(Answer)  # the real stage but for its model
ANSWER.__dict__.update({"engine": _NoEngine(), "_clock": _SharedClock()})
ACTORS = {"decode": 2, "compress": 1, "cache": 1, "answer": 4}


def _video(name: str, **columns: Any) -> dict[str, Any]:
    """Return a fresh video of 4 s: 2 s of decoding, 1 of compression, 0.5 of cache, 1 of answer."""
    return {
        "video_key": name,
        "uri": f"s3://b/{name}.mp4",
        "prompts": [{"prompt_id": "p", "prompt": "p?"}],
        "attempts": 1,
        "duration_s": 4.0,
        "num_video_tokens": 90,
        "num_audio_tokens": 10,
        "kept_video_tokens": 20,
        "kept_audio_tokens": 5,
        "decode_s": 2.0,
        "compress_s": 1.0,
        "cache_s": 0.5,
        "answer_s": 1.0,
        "cache_hit": False,
        "answers": [{"prompt_id": "p", "text": "yes"}],
        **columns,
    }


def _hit(name: str) -> dict[str, Any]:
    return _video(name, decode_s=None, compress_s=None, cache_hit=True)


def _failed(name: str, error_type: str = "truncated") -> dict[str, Any]:
    identity = {column: _video(name)[column] for column in ("video_key", "uri", "prompts")}
    row = rows.failed({**identity, "attempts": 1}, "decode", error_type, f"{name} is cut")
    [passed_on] = ANSWER(rows.build([row], rows.KEPT)).to_pylist()
    return dict(passed_on)


def _unanswered(name: str) -> dict[str, Any]:
    """Return a good video one of whose two prompts has failed."""
    failure = {"prompt_id": "q", "error_type": "out_of_memory", "error_message": "no memory"}
    return _video(
        name,
        prompts=[{"prompt_id": prompt, "prompt": f"{prompt}?"} for prompt in "pq"],
        answers=[{"prompt_id": "p", "text": "yes"}, failure],
    )


def _report(
    output: Path, blocks: Sequence[Sequence[Mapping[str, Any]]], counts: WorkCounts
) -> Report:
    sink = Sink(STORAGE, str(output / "run"), run_id="run", model="m", fingerprint="f")
    for block in blocks:
        sink(rows.build(block, rows.ANSWERED))
    return make_report(
        STORAGE,
        str(output),
        "run",
        counts=counts,
        actors=ACTORS,
        wall_s=8.0,
        held_s=5.0,
        warnings=["selector untrained"],
    )


def test_the_report_is_a_recount_of_the_files(tmp_path: Path) -> None:
    blocks = [
        [_video("a", nvdec=True), _failed("b"), _hit("c")],
        [_unanswered("d"), _failed("e", "too_long")],
    ]
    counts = WorkCounts(
        videos=7, fresh=4, cached=1, answered=2, prompts=6, prompts_answered=3, duplicates=1
    )
    report = _report(tmp_path, blocks, counts)
    assert (report.videos, report.videos_ok, report.videos_failed) == (5, 3, 2)
    assert (report.answers_ok, report.answers_failed) == (3, 3)
    assert report.failed_by_type == {"truncated": 1, "too_long": 1, "out_of_memory": 1}
    assert report.cache_hits == 1
    assert (report.nvdec, report.nvdec_not) == (1, 0)
    assert (report.tokens_before, report.tokens_after, report.retained) == (300, 75, 0.25)
    assert report.video_s == 12.0
    decode, compress, cache, answer = report.stages
    assert (decode.videos, decode.video_s, decode.busy_s) == (2, 8.0, 4.0)
    # 2 of the 5 s that each of the 2 decoding actors was held, 0.75 of the 4 that answer
    assert [stage.busy_share for stage in report.stages] == [0.4, 0.4, 0.3, 0.15]
    assert (decode.busy_s_per_actor, decode.videos_per_s, decode.video_s_per_s) == (2.0, 1.0, 4.0)
    assert (compress.videos, compress.busy_s, compress.videos_per_s) == (2, 2.0, 1.0)
    assert (cache.videos, cache.busy_s) == (3, 1.5)
    assert (answer.videos, answer.busy_s_per_actor, answer.video_s_per_s) == (3, 0.75, 16.0)
    uri = write_report(STORAGE, report)
    assert uri == str(tmp_path / "run" / "report.json")
    written = json.loads(Path(uri).read_text())
    assert written["source"]["prompts_answered"] == 3
    assert written["failed_by_type"] == report.failed_by_type
    assert written["stages"][0]["stage"] == "decode"


def test_a_report_does_not_depend_on_how_much_lies_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [_video, _failed, _hit, _unanswered]
    blocks = [[kinds[n % 4](f"{n}{m}") for n in range(7)] for m in range(3)]
    prompts = sum(len(row["prompts"]) for block in blocks for row in block)
    counts = WorkCounts(videos=21, fresh=15, cached=6, prompts=prompts)
    blocks.append(blocks[0])  # a task that was repeated
    expected = _report(tmp_path / "whole", blocks, counts)
    assert (expected.videos, expected.videos_failed) == (21, 6)
    monkeypatch.setattr(spilled_rows, "IN_MEMORY", 3)
    found = _report(tmp_path / "spilled", blocks, counts)

    def settled(report: Report) -> Mapping[str, Any]:
        same = {"output": "", "see_failures": ""}
        examples = sorted(report.examples, key=lambda example: example.uri)
        return {**vars(report), **same, "examples": examples}

    assert settled(found) == settled(expected)


def test_a_newcomer_finds_everything_in_the_text(tmp_path: Path) -> None:
    blocks = [[_video("a"), _failed("b"), _hit("c")]]
    text = render(_report(tmp_path, blocks, WorkCounts(videos=4, fresh=3, answered=1, prompts=3)))
    for line in (
        "tokens 200 before, 50 after compression (25.0% retained)",
        "warning: selector untrained",
        "  truncated: s3://b/b.mp4",
        "    b is cut",
        f"answers and report.json: {tmp_path / 'run'}",
        f"all of them: python jobs/show_answers.py output={tmp_path} status=failed run=run",
    ):
        assert line in text.splitlines()
    assert "took 8.0 s" in text
    assert "0.25 videos/s" in text  # 2 good ones in 8 s


def test_a_run_without_work_says_so(tmp_path: Path) -> None:
    report = _report(tmp_path, [], WorkCounts(videos=7, answered=7, prompts_answered=9))
    text = render(report)
    assert "no video was decoded, compressed or answered" in text
    assert "failures" not in text
    assert report.retained == 0.0


@pytest.mark.parametrize(
    "counts", [WorkCounts(fresh=3, prompts=2), WorkCounts(fresh=2, prompts=3), WorkCounts()]
)
def test_a_lost_row_is_a_bug(tmp_path: Path, counts: WorkCounts) -> None:
    with pytest.raises(RuntimeError, match="this is a bug"):
        _report(tmp_path, [[_video("a"), _video("b")]], counts)


def test_a_repeated_task_is_counted_once(tmp_path: Path) -> None:
    block = [_video("a"), _failed("b")]
    report = _report(tmp_path, [block, block], WorkCounts(fresh=2, prompts=2))
    assert (report.videos, report.videos_failed, report.answers_ok) == (2, 1, 1)
    assert len(report.examples) == 1


def test_ten_examples_show_every_kind_of_failure_first(tmp_path: Path) -> None:
    block = [_failed(f"v{n:02}") for n in range(20)] + [_failed("w", "too_long")]
    report = _report(tmp_path, [block], WorkCounts(fresh=21, prompts=21))
    kinds = [example.error_type for example in report.examples]
    assert sorted(kinds[:2]) == ["too_long", "truncated"]
    assert len(kinds) == 10
