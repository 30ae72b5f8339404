import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import compare_engines
from omnisift.mini.questions import caption
from pipeline import rows
from pipeline.answers import commit
from pipeline.config import StorageConfig
from pipeline.keys import prompt_id
from pipeline.storage import Storage


def _write(output: Path, said: dict[tuple[str, str], dict[str, Any]]) -> compare_engines.Answers:
    """Write answers as the sink does, and read them as the job does."""
    answers = [
        {
            "video_key": name,
            "uri": f"/videos/{name}",
            "prompt_id": asked,
            "prompt": f"{asked}?",
            "status": "ok",
            "num_prompt_tokens": 100,
            "finish_reason": "stop",
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
            **columns,
        }
        for (name, asked), columns in said.items()
    ]
    (output / "run").mkdir(parents=True)
    pq.write_table(rows.build(answers, rows.ANSWERS), output / "run" / "answers-0.parquet")
    commit(Storage(StorageConfig()), str(output), "run")
    return compare_engines.read(output)


def _cells(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_what_is_equal_and_what_is_right_are_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = compare_engines.draw(1, 2)
    [(name, (scene, questions))] = asked.items()
    true = caption(scene)
    sentences = true.count(". ") + 1
    right = {
        (name, prompt_id("Describe it.")): {"text": true},
        (name, "again"): {"text": true},
        (name, "free-0"): {"text": questions[0].answer},
        (name, "free-1"): {"text": questions[1].answer},
        (name, "choice-0"): {"text": questions[0].answer},
        (name, "choice-1"): {"text": questions[1].answer},
    }
    failed = {"text": None, "status": "failed", "error_message": "it died"}
    failed |= {"num_prompt_tokens": None, "finish_reason": None}
    other: dict[tuple[str, str], dict[str, Any]] = {
        **right,
        (name, "again"): {"text": true.partition(". ")[2], "num_prompt_tokens": 99},
        (name, "free-1"): {"text": "no idea", "finish_reason": "length"},
        (name, "choice-0"): failed,
    }
    both = [_write(tmp_path / "first", right), _write(tmp_path / "second", other)]
    compare_engines.compare(["one", "two"], both, asked)
    printed = capsys.readouterr().out
    head, *lines = _cells(printed)
    assert head[-1] == "right: one, two"
    of = f"{sentences} of {sentences}"
    assert lines == [
        ["captions", "1", "1", "1", "1", f"{of}, {of}"],
        ["captions, asked again", "1", "0", "0", "1", f"{of}, {sentences - 1} of {sentences}"],
        ["questions", "2", "1", "2", "1", "2 of 2, 1 of 2"],
        ["questions with choices", "2", "1", "1", "1", "2 of 2, 1 of 2"],
    ]
    assert "3 of 6 texts differ:" in printed
    assert f"{name}, free-1: free-1?\n    one: {questions[1].answer}\n    two: no idea" in printed
    assert "    two: it died" in printed
    del other[name, "again"]
    both[1] = _write(tmp_path / "third", other)
    with pytest.raises(RuntimeError, match="one was asked 6 times, two 5 times, 5 times the same"):
        compare_engines.compare(["one", "two"], both, asked)


def test_a_question_with_choices_has_its_answer_among_different_options(tmp_path: Path) -> None:
    asked = compare_engines.draw(2, 6)
    table = compare_engines.write_videos(tmp_path / "videos", asked)
    assert {path.name for path in table.parent.glob("*.mp4")} == asked.keys()
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (1 + 2 * 6)
    for line in lines:
        part, _, number = line["prompt_id"].partition("-")
        if number:
            question = asked[line["uri"]].questions[int(number)]
            assert line["prompt"] == question.text
            options = line["choices"].split("|") if part == "choice" else [question.answer] * 4
            assert question.answer in options
            assert len(options) == 4
            assert len(set(options)) == (4 if part == "choice" else 1)


def test_a_folder_that_was_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare_engines.main(["--folder", str(tmp_path)])
    assert f"{tmp_path} exists; name a new one" in capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_held_against_itself_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--engines", "transformers", "transformers", "--scenes", "1", "--questions", "2"]
    small = ["answer.max_new_tokens=8", "answer.batch_videos=2"]
    compare_engines.main([*words, "--folder", str(tmp_path / "new"), *small])
    printed = capsys.readouterr().out
    lines = {tuple(cells[:2]): cells for cells in _cells(printed)}
    for part, number in {"captions": "1", "captions, asked again": "1", "questions": "2"}.items():
        assert lines[part, number][2:5] == [number] * 3
    assert lines["questions with choices", "2"][2:5] == ["2"] * 3
    runs = [cells for cells in _cells(printed) if cells[1] == "transformers"]
    assert [cells[0] for cells in runs] == ["captions"] * 2 + ["questions"] * 2
    assert [cells[4] for cells in runs] == ["1", "1", "5", "5"]
    assert all(float(cells[6]) > 0 for cells in runs)
    assert printed.count("answer.max_new_tokens=8 ") == 4
    assert printed.count("1 videos: 1 to decode and compress") == 1  # the cache serves the others
