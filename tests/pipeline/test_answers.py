import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import key_index, rows, spilled_rows
from pipeline.answer_index import AnswerIndex
from pipeline.answers import COMMITTED, commit, find_files, read_answers
from pipeline.config import StorageConfig
from pipeline.errors import StartupError
from pipeline.storage import Storage

STORAGE = Storage(StorageConfig())
START = datetime(2026, 1, 1, tzinfo=UTC)


def _answer(
    key: str, prompt_id: str, text: str = "", *, at: int = 0, **columns: Any
) -> dict[str, Any]:
    return {
        "video_key": hashlib.sha256(key.encode()).hexdigest(),
        "uri": f"s3://b/{key[0]}",  # keys a1 and a2 are two states of one object
        "prompt_id": prompt_id,
        "prompt": f"{prompt_id}?",
        "text": text,
        "status": "ok",
        "attempts": 1,
        "fingerprint": "f",
        "run_id": "run",
        "created_at": START + timedelta(seconds=at),
        **columns,
    }


def _failure(key: str, prompt_id: str, **columns: Any) -> dict[str, Any]:
    failure = {"status": "failed", "error_stage": "decode", "error_type": "truncated"}
    return _answer(key, prompt_id, **{**failure, **columns})


def _write(output: Path, run_id: str, answers: Sequence[dict[str, Any]]) -> None:
    """Write one file of each kind, as the sink does."""
    folder = output / run_id
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))
    pq.write_table(rows.build(answers, rows.ANSWERS), folder / f"answers-{number}.parquet")
    pq.write_table(rows.build(answers, rows.VIDEOS), folder / f"videos-{number}.parquet")


def _texts(output: Path, *, committed_only: bool = True) -> list[str]:
    table = read_answers(str(output), STORAGE, committed_only=committed_only)
    assert table.schema.equals(rows.ANSWERS)
    return sorted(row["text"] or row["error_type"] for row in table.to_pylist())


def _index(output: Path, fingerprint: str = "f") -> AnswerIndex:
    return AnswerIndex(STORAGE, str(output), fingerprint=fingerprint)


def _answered(index: AnswerIndex, key: str, prompt_id: str) -> bool:
    answer = _answer(key, prompt_id)
    return bool(index.answered([(answer["video_key"], prompt_id, answer["prompt"])])[0])


def test_a_run_is_visible_only_when_it_is_committed(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "one")])
    assert _texts(tmp_path) == []
    assert _texts(tmp_path, committed_only=False) == ["one"]
    commit(STORAGE, str(tmp_path), "run-1")
    assert _texts(tmp_path) == ["one"]


def test_the_marker_counts_and_names_what_it_commits(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p"), _answer("a", "q")])
    _write(tmp_path, "run-1", [_answer("b", "p")])
    (tmp_path / "run-1" / "work").mkdir()
    pq.write_table(rows.IDENTITY.empty_table(), tmp_path / "run-1" / "work" / "fresh-0.parquet")
    commit(STORAGE, str(tmp_path), "run-1")
    marker = json.loads((tmp_path / "run-1" / COMMITTED).read_text())
    assert datetime.fromisoformat(marker.pop("created_at")) > START
    names = ["answers-0.parquet", "answers-2.parquet", "videos-0.parquet", "videos-2.parquet"]
    assert marker == {
        "run_id": "run-1",
        "files": names,
        "num_answers": 3,
        "num_videos": 3,
        "replaces": [],
    }


def test_a_killed_run_is_neither_asked_again_nor_lost(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "one"), _failure("b", "p", attempts=4)])
    index = _index(tmp_path)
    assert _answered(index, "a", "p")
    assert not _answered(index, "b", "p")
    assert [index.attempts(_answer(key, "p")["video_key"]) for key in "abc"] == [0, 4, 0]
    _write(tmp_path, "run-2", [_answer("b", "p", "two", at=1)])
    done = commit(STORAGE, str(tmp_path), "run-2", index.orphans)
    assert "../run-1/answers-0.parquet" in done.files
    assert (done.num_answers, done.num_videos) == (3, 3)
    assert _texts(tmp_path) == ["one", "two"]
    assert find_files(str(tmp_path), STORAGE).orphans == ()


def test_a_run_adopted_twice_and_committed_late_is_seen_once(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "one")])
    orphans = _index(tmp_path).orphans
    commit(STORAGE, str(tmp_path), "run-2", orphans)
    commit(STORAGE, str(tmp_path), "run-3", orphans)
    _write(tmp_path, "run-1", [_answer("b", "p", "two")])  # it was not dead after all
    assert len(_index(tmp_path).orphans) == 2
    commit(STORAGE, str(tmp_path), "run-1")
    assert _texts(tmp_path) == ["one", "two"]


def test_a_run_that_wrote_nothing_can_be_committed(tmp_path: Path) -> None:
    done = commit(STORAGE, str(tmp_path), "run-1")
    assert done.files == []
    assert _texts(tmp_path) == []


def test_an_output_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    output = tmp_path / "none"
    assert _texts(output) == []
    assert len(_index(output)) == 0
    assert not _answered(_index(output), "a", "p")
    assert _index(output).answered([]).tolist() == []


def test_the_cache_and_nested_outputs_are_no_runs(tmp_path: Path) -> None:
    _write(tmp_path / "cache" / "f", "run", [_answer("a", "p", "nested")])
    assert _texts(tmp_path, committed_only=False) == []
    assert _index(tmp_path).orphans == []


@pytest.mark.parametrize("spelling", ["{}/", "file://{}", "{}/../{name}"])
def test_other_spellings_of_a_local_output_are_the_same(tmp_path: Path, spelling: str) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "one")])
    output = spelling.format(tmp_path, name=tmp_path.name)
    index = AnswerIndex(STORAGE, output, fingerprint="f")
    commit(STORAGE, output, "run-2", index.orphans)
    commit(STORAGE, output, "run-1")
    assert read_answers(output, STORAGE).column("text").to_pylist() == ["one"]


def test_an_answer_beats_a_failure_and_then_the_latest_wins(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "new", at=5), _failure("b", "p", at=5)])
    _write(tmp_path, "run-1", [_answer("a", "p", "old", at=1), _answer("b", "p", "ok", at=1)])
    _write(tmp_path, "run-1", [_failure("c", "p", at=1, error_type="first")])
    _write(tmp_path, "run-1", [_failure("c", "p", at=2, error_type="second")])
    commit(STORAGE, str(tmp_path), "run-1")
    assert _texts(tmp_path) == ["new", "ok", "second"]


def test_a_changed_object_supersedes_its_old_answers_even_when_it_fails(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a1", "p", "old"), _answer("a1", "q", "old")])
    _write(tmp_path, "run-1", [_answer("a2", "p", "new", at=1)])
    _write(tmp_path, "run-1", [_answer("b1", "p", "stale"), _failure("b2", "p", at=1)])
    commit(STORAGE, str(tmp_path), "run-1")
    assert _texts(tmp_path) == ["new", "truncated"]


def test_an_object_that_is_away_for_a_night_keeps_its_answers(tmp_path: Path) -> None:
    away = {"error_stage": "source", "error_type": "not_found", "at": 1}
    _write(tmp_path, "run-1", [_answer("a1", "p", "kept"), _failure("a2", "p", **away)])
    _write(tmp_path, "run-1", [_failure("b1", "p", **away)])  # never seen
    commit(STORAGE, str(tmp_path), "run-1")
    assert _texts(tmp_path) == ["kept", "not_found"]


def _oracle(answers: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Apply the rules of read_answers one row at a time."""
    order = [
        (row["error_stage"] != "source", row["created_at"], n) for n, row in enumerate(answers)
    ]
    key_of: dict[str, str] = {}
    for n in sorted(range(len(answers)), key=lambda n: order[n]):
        key_of[answers[n]["uri"]] = answers[n]["video_key"]
    seen: dict[tuple[str, str], tuple[Any, str]] = {}
    for n, row in enumerate(answers):
        if key_of[row["uri"]] == row["video_key"]:
            place = (row["video_key"], row["prompt_id"])
            best = ((row["status"] == "ok", row["created_at"], n), row["text"])
            seen[place] = max(seen.get(place, best), best)
    return sorted((key, prompt, text) for (key, prompt), (_, text) in seen.items())


some_answers = st.lists(
    st.tuples(
        st.sampled_from(["a1", "a2", "b1", "b2"]),
        st.sampled_from("pq"),
        st.sampled_from([None, "decode", "source"]),
        st.integers(0, 3),
    ),
    max_size=10,
)


def _write_drawn(
    output: Path, drawn: list[tuple[str, str, str | None, int]], cut: int
) -> list[dict[str, Any]]:
    """Write what was drawn, named by its place, as two runs; return it."""
    answers = [
        _answer(key, prompt, str(n), at=at, status="failed" if stage else "ok", error_stage=stage)
        for n, (key, prompt, stage, at) in enumerate(drawn)
    ]
    _write(output, "run-1", answers[:cut])
    _write(output, "run-2", answers[cut:])
    return answers


@settings(max_examples=100, deadline=None)
@given(some_answers, st.integers(0, 10))
def test_readers_see_what_a_slow_reader_sees(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[str, str, str | None, int]],
    cut: int,
) -> None:
    output = tmp_path_factory.mktemp("output")
    answers = _write_drawn(output, drawn, cut)
    found = read_answers(str(output), STORAGE, committed_only=False).to_pylist()
    seen = sorted((row["video_key"], row["prompt_id"], row["text"]) for row in found)
    assert seen == _oracle(answers)


@settings(max_examples=100, deadline=None)
@given(some_answers, st.integers(0, 10), st.integers(1, 8))
def test_answers_in_partitions_are_those_that_a_slow_reader_sees(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[str, str, str | None, int]],
    cut: int,
    in_memory: int,
) -> None:
    output = tmp_path_factory.mktemp("output")
    answers = _write_drawn(output, drawn, cut)
    with (
        mock.patch.object(spilled_rows, "IN_MEMORY", in_memory),
        mock.patch.object(key_index, "IN_MEMORY", in_memory),
    ):
        index = _index(output)
    by_text = {answer["text"]: answer for answer in answers}
    seen = [(key, prompt, by_text[text]) for key, prompt, text in _oracle(answers)]
    ok = {(key, prompt) for key, prompt, answer in seen if answer["status"] == "ok"}
    asked = {(answer["video_key"], answer["prompt_id"]): answer["prompt"] for answer in answers}
    assert len(index) == len(ok)
    for (key, prompt_id), prompt in asked.items():
        assert index.answered([(key, prompt_id, prompt)]).tolist() == [(key, prompt_id) in ok]
    videos = {(row["uri"], row["video_key"]) for part in index.videos for row in part.to_pylist()}
    assert videos == {
        (answer["uri"], key) for key, _, answer in seen if answer["error_stage"] != "source"
    }


def test_answers_of_other_settings_are_not_done(tmp_path: Path) -> None:
    answers = [_answer("a", "p", fingerprint="f"), _answer("b", "p", fingerprint="g")]
    _write(tmp_path, "run-1", answers)
    for fingerprint, done in (("f", [True, False]), ("g", [False, True]), ("h", [False, False])):
        index = _index(tmp_path, fingerprint)
        assert [_answered(index, key, "p") for key in "ab"] == done


def test_settings_that_go_back_are_asked_again_for_readers_see_the_others(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", fingerprint="f")])
    _write(tmp_path, "run-2", [_answer("a", "p", at=1, fingerprint="g")])
    assert not _answered(_index(tmp_path, "f"), "a", "p")
    assert _answered(_index(tmp_path, "g"), "a", "p")


def test_a_failure_with_other_settings_takes_no_answer_away(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", fingerprint="f")])
    _write(tmp_path, "run-2", [_failure("a", "p", at=1, fingerprint="g", attempts=3)])
    assert _answered(_index(tmp_path, "f"), "a", "p")
    index = _index(tmp_path, "g")
    assert not _answered(index, "a", "p")
    assert index.attempts(_answer("a", "p")["video_key"]) == 3


def test_an_object_that_goes_back_is_asked_again(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a1", "p")])
    _write(tmp_path, "run-2", [_answer("a2", "p", at=1)])
    index = _index(tmp_path)
    assert [_answered(index, key, "p") for key in ("a1", "a2")] == [False, True]


def test_an_unreadable_answers_file_is_reported_asked_again_and_not_adopted(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "one")])
    broken = tmp_path / "run-1" / "answers-0.parquet"
    broken.write_bytes(broken.read_bytes()[:-9])
    index = _index(tmp_path)
    assert index.unreadable == [str(broken)]
    assert not _answered(index, "a", "p")
    assert index.orphans == [str(tmp_path / "run-1" / "videos-0.parquet")]


def test_a_broken_marker_is_said_at_the_start(tmp_path: Path) -> None:
    _write(tmp_path, "run-1", [_answer("a", "p", "one")])
    (tmp_path / "run-1" / COMMITTED).write_text("{}")
    with pytest.raises(StartupError, match=r"output=.*run-1/_COMMITTED"):
        _index(tmp_path)


def test_an_answer_among_other_choices_is_another_answer(tmp_path: Path) -> None:
    answer = _answer("a", "p", "yes", choices=["yes", "no"])
    _write(tmp_path, "run", [answer])
    index = _index(tmp_path)
    ask = (answer["video_key"], "p", answer["prompt"])
    asks = [(*ask, ["yes", "no"]), (*ask, ["no", "yes"]), (*ask, ["yes", "no", "maybe"])]
    assert index.answered(asks).tolist() == [True, False, False]
    assert not _answered(index, "a", "p")  # as free text
    failed = _failure("b", "p", choices=["yes", "no"])
    _write(tmp_path, "run", [failed])
    index = _index(tmp_path)
    assert index.ask_given_up(failed["video_key"], "p", failed["prompt"], ["yes", "no"])
    assert not index.ask_given_up(failed["video_key"], "p", failed["prompt"])


def test_answers_written_before_there_were_choices_still_count(tmp_path: Path) -> None:
    _write(tmp_path, "run", [_answer("a", "p", "old")])
    [file] = (tmp_path / "run").glob("answers-*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["choices"]), file)
    assert _answered(_index(tmp_path), "a", "p")
    _write(tmp_path, "later", [_answer("b", "p", "new", choices=["new", "old"])])
    assert _texts(tmp_path, committed_only=False) == ["new", "old"]
