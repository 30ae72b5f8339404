"""Videos that are cut into windows, run after run, on real stores; decoding and model are faked."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.show_answers import choose, span
from pipeline import keys, rows
from pipeline.answers import read_answers
from pipeline.compact_answers import compact_answers
from pipeline.config import (
    AnswerConfig,
    MediaConfig,
    RetryConfig,
    ShowConfig,
    SyncConfig,
    TrainConfig,
)
from pipeline.media_windows import cut
from pipeline.parquet import read_columns
from pipeline.readers_view import seen_by_readers
from pipeline.report import Report, render
from pipeline.storage import join
from pipeline.token_cache import CacheIndex, find_folders
from pipeline.verify import verify_cache, verify_output
from tests.pipeline.corpus import STORAGE, Corpus

MANY = [("b.mp4", 4.0 * n, min(4.0 * n + 4, 83.0), "ok") for n in range(21)]


@pytest.fixture
def cut_corpus(corpus: Corpus) -> Corpus:
    """Return a corpus in which b.mp4 has four windows, and nothing is broken."""
    corpus.config = replace(corpus.config, media=MediaConfig(window_s=4))
    corpus.lengths["b.mp4"] = 15.5
    corpus.put("videos/sub/broken.mp4", b"")
    corpus.broken = ""
    return corpus


WHOLE = [("a b#1?%20ä.mp4", None, None, "ok")]
BROKEN = [("broken.mp4", None, None, "ok")]
FOUR = [
    ("b.mp4", 0.0, 4.0, "ok"),
    ("b.mp4", 4.0, 8.0, "ok"),
    ("b.mp4", 8.0, 12.0, "ok"),
    ("b.mp4", 12.0, 15.5, "ok"),
]
ALL = [*WHOLE, *FOUR, *BROKEN]


def run(corpus: Corpus, **how: object) -> Report:
    corpus.compressed, corpus.asked = [], []
    report = corpus.run(**how)  # type: ignore[arg-type]
    assert report is not None
    return report


def in_order(span: tuple[str, float | None, float | None, str]) -> tuple[str, float, float]:
    return span[0], span[1] or 0.0, span[2] or 0.0


def fault_free(corpus: Corpus) -> None:
    assert list(verify_output(STORAGE, corpus.config.output)) == []
    for folder in find_folders(STORAGE, corpus.config.cache_root):
        assert list(verify_cache(STORAGE, folder)) == []


def compaction_changes_nothing(corpus: Corpus) -> None:
    before = read_answers(corpus.config.output, STORAGE)
    later = datetime.now(UTC) + timedelta(days=1)
    for _ in range(2):
        done = compact_answers(
            STORAGE, corpus.config.output, target_bytes=1 << 20, grace_s=0.0, now=later
        )
    assert done.deleted > 0
    order = [("video_key", "ascending"), ("prompt_id", "ascending")]
    after = read_answers(corpus.config.output, STORAGE)
    assert after.sort_by(order).equals(before.sort_by(order))
    fault_free(corpus)


@pytest.mark.parametrize(
    ("duration_s", "ends"),
    [
        (1.0, [1.0]),
        (4.0, [4.0]),
        (6.0, [6.0]),
        (6.01, [4.0, 6.01]),
        (10.0, [4.0, 10.0]),
        (15.5, [4.0, 8.0, 12.0, 15.5]),
    ],
)
def test_windows_follow_each_other_and_the_last_is_no_splinter(
    duration_s: float, ends: list[float]
) -> None:
    windows = cut(duration_s, 4.0)
    assert [window.end_s for window in windows] == ends
    assert [window.start_s for window in windows] == [0.0, *ends[:-1]]
    assert [window.is_last for window in windows] == [False] * (len(ends) - 1) + [True]
    assert {window.count for window in windows} == {len(ends)}
    assert [window.end_s for window in cut(duration_s, 0.0)] == [duration_s]


def test_each_window_is_a_row_and_a_second_run_finds_them_all(cut_corpus: Corpus) -> None:
    first = run(cut_corpus)
    assert (first.source.videos, first.source.fresh, first.source.windows) == (3, 3, 0)
    assert (first.videos, first.windows, first.answers_ok) == (6, 4, 6)
    assert "windows of longer videos              4" in render(first)
    assert cut_corpus.spans() == ALL
    fault_free(cut_corpus)
    second = run(cut_corpus)
    assert cut_corpus.compressed == []
    assert (second.source.answered, second.videos) == (3, 0)
    assert cut_corpus.spans() == ALL


def test_another_question_is_asked_of_every_window_from_the_cache(cut_corpus: Corpus) -> None:
    run(cut_corpus)
    report = run(cut_corpus, answer=AnswerConfig(prompt="Who?"))
    assert cut_corpus.compressed == []
    names = ["a b#1?%20ä.mp4", *(f"b.mp4 {start}" for start in (0, 12, 4, 8)), "broken.mp4"]
    assert sorted(cut_corpus.asked) == sorted((name, "Who?") for name in names)
    assert (report.source.cached, report.source.windows, report.cache_hits) == (3, 3, 6)
    assert cut_corpus.spans() == sorted(ALL * 2)
    fault_free(cut_corpus)


@pytest.mark.parametrize("lost", [{"b.mp4 12"}, {"b.mp4 4", "b.mp4 8"}, {"b.mp4 0"}])
def test_a_killed_run_decodes_only_the_windows_that_it_lost(
    cut_corpus: Corpus, lost: set[str]
) -> None:
    cut_corpus.lost = lost
    assert cut_corpus.run(killed=True) is None
    cut_corpus.lost = set()
    report = run(cut_corpus)
    assert set(cut_corpus.compressed) == lost
    assert (report.source.fresh, report.source.answered, report.videos) == (1, 2, len(lost))
    assert cut_corpus.spans() == ALL
    assert run(cut_corpus).videos == 0
    fault_free(cut_corpus)


def test_a_window_that_fails_for_good_leaves_the_others(cut_corpus: Corpus) -> None:
    cut_corpus.poison = {"b.mp4 4": "decode_error"}
    first = run(cut_corpus)
    assert (first.videos_ok, first.videos_failed) == (5, 1)
    expected = [*WHOLE, FOUR[0], ("b.mp4", 4.0, 8.0, "failed"), *FOUR[2:], *BROKEN]
    assert cut_corpus.spans() == expected
    second = run(cut_corpus)
    assert (cut_corpus.compressed, second.source.given_up, second.videos) == ([], 1, 0)
    third = run(cut_corpus, answer=AnswerConfig(prompt="Who?"))  # its failure is known
    assert cut_corpus.compressed == []
    assert third.failed_by_type == {"decode_error": 1}
    known = ("b.mp4", 4.0, None, "failed")  # nobody looked up again how long it is
    assert Counter(cut_corpus.spans()) == Counter([*expected, *ALL[:2], known, *ALL[3:]])
    fault_free(cut_corpus)


def test_a_window_that_may_succeed_is_tried_again_alone(cut_corpus: Corpus) -> None:
    cut_corpus.poison = {"b.mp4 8": "decode_timeout"}
    for attempt in range(3):
        run(cut_corpus)
        assert cut_corpus.compressed[-1] == "b.mp4 8" or attempt == 0
        assert len(cut_corpus.compressed) == (6 if attempt == 0 else 1)
    assert run(cut_corpus).source.given_up == 1
    assert cut_corpus.compressed == []
    [failed] = [
        row
        for row in read_answers(cut_corpus.config.output, STORAGE).to_pylist()
        if row["status"] == "failed"
    ]
    assert (failed["attempts"], failed["start_s"]) == (3, 8.0)


def test_more_windows_than_are_looked_for_at_once(cut_corpus: Corpus) -> None:
    cut_corpus.lengths["b.mp4"] = 83.0
    run(cut_corpus)
    assert cut_corpus.spans() == sorted([*WHOLE, *MANY, *BROKEN])
    assert run(cut_corpus).videos == 0
    assert cut_corpus.compressed == []


def test_another_length_of_windows_supersedes_the_first(cut_corpus: Corpus) -> None:
    run(cut_corpus)
    media = cut_corpus.config.media
    cut_corpus.config = replace(cut_corpus.config, media=replace(media, window_s=8))
    run(cut_corpus)
    assert len(cut_corpus.compressed) == 4
    halves = [("b.mp4", 0.0, 8.0, "ok"), ("b.mp4", 8.0, 15.5, "ok")]
    assert cut_corpus.spans() == [*WHOLE, *halves, *BROKEN]
    cut_corpus.config = replace(cut_corpus.config, media=replace(media, window_s=0))
    run(cut_corpus)
    assert cut_corpus.spans() == [*WHOLE, ("b.mp4", None, None, "ok"), *BROKEN]
    cut_corpus.config = replace(cut_corpus.config, media=media)
    back = run(cut_corpus)  # what was kept for it is still there
    assert (cut_corpus.compressed, back.cache_hits) == ([], 6)
    assert cut_corpus.spans() == ALL
    fault_free(cut_corpus)


def test_a_table_of_questions_names_a_video_by_uri_or_by_the_key_of_a_window(
    cut_corpus: Corpus,
) -> None:
    run(cut_corpus)
    answers = read_answers(cut_corpus.config.output, STORAGE).to_pylist()
    window = next(row for row in answers if row["start_s"] == 8.0)
    whole = next(row for row in answers if row["uri"].endswith("ä.mp4"))
    lines = [
        f'{{"uri": "{window["uri"]}", "prompt": "By uri?"}}',
        f'{{"video_key": "{window["video_key"]}", "prompt": "By window?"}}',
        f'{{"video_key": "{window["object_key"]}", "prompt": "By object?"}}',
        f'{{"video_key": "{whole["video_key"]}", "prompt": "By key?"}}',
    ]
    cut_corpus.put("videos/asked.jsonl", "\n".join(lines).encode())
    table = join(cut_corpus.config.source, "asked.jsonl")
    cut_corpus.config = replace(cut_corpus.config, source=table)
    report = run(cut_corpus)
    assert cut_corpus.compressed == []
    asked = Counter(prompt for _, prompt in cut_corpus.asked)
    assert asked == {"By uri?": 4, "By window?": 4, "By object?": 4, "By key?": 1}
    assert (report.videos_failed, report.source.videos) == (0, 2)


def test_a_video_that_is_gone_takes_its_windows_along(cut_corpus: Corpus) -> None:
    run(cut_corpus)
    sync = SyncConfig(delete=True, max_share=0.5)
    cut_corpus.config = replace(cut_corpus.config, sync=sync)
    STORAGE.delete(join(cut_corpus.config.source, "b.mp4"))
    report = run(cut_corpus)
    assert (report.gone, report.removed) == (1, 1)
    assert cut_corpus.spans() == [*WHOLE, *BROKEN]
    [folder] = find_folders(STORAGE, cut_corpus.config.cache_root)
    assert len(CacheIndex(STORAGE, folder)) == 2


def test_compaction_keeps_what_readers_see(cut_corpus: Corpus) -> None:
    cut_corpus.poison = {"b.mp4 8": "decode_timeout"}
    run(cut_corpus)
    cut_corpus.poison = {}
    run(cut_corpus)
    run(cut_corpus, answer=AnswerConfig(prompt="Who?"))
    compaction_changes_nothing(cut_corpus)
    assert run(cut_corpus).videos == 0


def test_a_whole_failure_is_seen_until_windows_follow_it(cut_corpus: Corpus) -> None:
    cut_corpus.lengths["b.mp4"] = 1.0  # as when a worker dies before it is known where to cut
    cut_corpus.poison = {"b.mp4": "worker_crash"}
    run(cut_corpus)
    assert cut_corpus.spans() == [*WHOLE, ("b.mp4", None, None, "failed"), *BROKEN]
    cut_corpus.lengths["b.mp4"] = 15.5
    run(cut_corpus)
    assert cut_corpus.spans() == ALL
    assert run(cut_corpus).videos == 0


def dies_behind(corpus: Corpus, end_s: float) -> None:
    """Let b.mp4's worker die at `end_s`: what is before went on, then it fails as a whole."""
    compress = corpus.compress

    def dying(block: pa.Table) -> pa.Table:
        made = compress(block).to_pylist()
        lost = [row for row in made if (row["start_s"] or 0.0) >= end_s]
        for row in lost[:1]:
            whole = {**row, "video_key": row["object_key"], "start_s": None, "windows": None}
            made.append(rows.failed({**whole, "tokens": None}, "decode", "worker_crash", "died"))
        return rows.build([row for row in made if row not in lost], rows.KEPT)

    corpus.compress = dying  # type: ignore[method-assign]


DIED = [*WHOLE, ("b.mp4", None, None, "failed"), *FOUR[:2], *BROKEN]


def test_a_video_that_dies_behind_some_of_its_windows_is_accounted_for(cut_corpus: Corpus) -> None:
    compress = cut_corpus.compress
    dies_behind(cut_corpus, 8.0)
    report = run(cut_corpus)
    assert (report.videos, report.videos_failed, report.source.fresh) == (5, 1, 3)
    assert cut_corpus.spans() == DIED
    cut_corpus.compress = compress  # type: ignore[method-assign]
    run(cut_corpus)
    assert cut_corpus.compressed == ["b.mp4 8", "b.mp4 12"]
    assert cut_corpus.spans() == ALL


def test_the_failure_of_a_remainder_is_seen_until_each_question_has_been_put_to_all_of_it(
    cut_corpus: Corpus,
) -> None:
    who = AnswerConfig(prompt="Who?")
    compress = cut_corpus.compress
    dies_behind(cut_corpus, 8.0)
    for _ in range(2):
        run(cut_corpus)
        assert cut_corpus.spans() == DIED
    asked = run(cut_corpus, answer=who)  # its third death, and the first two windows' new answers
    assert (asked.answers_ok, asked.failed_by_type) == (4, {"worker_crash": 1})
    assert cut_corpus.spans() == sorted(DIED * 2, key=in_order)
    fault_free(cut_corpus)

    # Given up: a question is told so once.
    what = run(cut_corpus, answer=AnswerConfig(prompt="What?"))
    assert (what.source.cached, what.source.windows, what.answers_ok) == (3, 2, 4)
    assert what.failed_by_type == {"worker_crash": 1}
    assert cut_corpus.spans() == sorted(DIED * 3, key=in_order)
    again = run(cut_corpus, answer=AnswerConfig(prompt="What?"))
    assert (again.source.given_up, again.source.answered, again.videos) == (1, 2, 0)
    fault_free(cut_corpus)
    compaction_changes_nothing(cut_corpus)

    cut_corpus.compress = compress  # type: ignore[method-assign]
    cut_corpus.config = replace(cut_corpus.config, retry=RetryConfig(failed=True))
    run(cut_corpus, answer=who)
    assert cut_corpus.compressed == ["b.mp4 8", "b.mp4 12"]
    assert cut_corpus.spans() == sorted([*DIED, *DIED, *ALL], key=in_order)
    compaction_changes_nothing(cut_corpus)
    run(cut_corpus)
    run(cut_corpus, answer=AnswerConfig(prompt="What?"))
    assert cut_corpus.compressed == []
    assert cut_corpus.spans() == sorted(ALL * 3, key=in_order)


@pytest.mark.parametrize("dated", [(10, 10), (10, 15), (15, 10), (15, 15)])
def test_the_failure_of_a_remainder_is_seen_whatever_the_sink_dates_first(
    dated: tuple[int, int],
) -> None:
    day = datetime(2026, 1, 1, tzinfo=UTC)
    video = keys.missing_key("b.mp4")
    shared = {"object_key": video, "window_s": 4.0, "uri": "b.mp4"}

    def window(number: int, at_s: float, prompt: str = "q1") -> dict[str, Any]:
        key = keys.window_key(video, 4.0, number, last=number == 3)
        own = {"video_key": key, "start_s": 4.0 * number, "prompt_id": prompt, "status": "ok"}
        return {**shared, **own, "created_at": day + timedelta(seconds=at_s)}

    died: dict[str, Any] = {**shared, "video_key": video, "prompt_id": "q1", "status": "failed"}
    died |= {"error_stage": "decode", "created_at": day + timedelta(seconds=12)}
    one_run = [window(0, dated[0]), window(1, dated[1]), died]

    def is_seen(*later: dict[str, Any]) -> bool:
        seen = seen_by_readers(rows.build([*one_run, *later], rows.ANSWERS)).to_pylist()
        return ("q1", None) in {(row["prompt_id"], row["start_s"]) for row in seen}

    assert is_seen()
    assert is_seen(window(2, 90))  # the last is missing
    assert is_seen(window(3, 90))  # the one before it is
    assert is_seen(*(window(number, 90, "q2") for number in range(4)))
    assert not is_seen(window(2, 90), window(3, 91))


def test_a_lost_window_is_a_bug_that_the_report_raises(cut_corpus: Corpus) -> None:
    cut_corpus.lost = {"b.mp4 8"}
    with pytest.raises(RuntimeError, match="6 videos, or windows of them, went in, 5 came out"):
        cut_corpus.run()


def test_files_of_before_there_were_windows_are_read(cut_corpus: Corpus) -> None:
    old = replace(cut_corpus.config, media=MediaConfig())
    new, cut_corpus.config = cut_corpus.config, old
    run(cut_corpus)
    later = {"object_key", "window_s", "start_s", "end_s", "windows"}
    for info in list(STORAGE.list(old.output, suffixes=(".parquet",))):
        if "/work/" in info.uri or "/cache/" in info.uri:
            continue
        table = read_columns(STORAGE, info.uri)
        older = table.drop_columns([name for name in table.column_names if name in later])
        sink = pa.BufferOutputStream()
        pq.write_table(older, sink)
        STORAGE.write(info.uri, sink.getvalue())
    assert run(cut_corpus).videos == 0
    fault_free(cut_corpus)
    cut_corpus.config = new
    run(cut_corpus)
    assert cut_corpus.spans() == ALL


def test_the_keys_of_windows_are_all_different_and_stay_what_they_are() -> None:
    made = [
        keys.window_key(video, window_s, number, last=last)
        for video in ("a", "b")
        for window_s in (4, 8)
        for number in (0, 1, 11)
        for last in (False, True)
    ]
    assert len(set(made)) == len(made)
    assert keys.window_key("a", 4, 1, last=False) == keys.window_key("a", 4.0, 1, last=False)


def test_training_reads_whole_clips() -> None:
    with pytest.raises(
        ValueError, match=r"media\.window_s must be 0 \(training reads whole clips\)"
    ):
        TrainConfig(data="lines.jsonl", output="run", media=MediaConfig(window_s=4))


def test_answers_are_shown_in_the_order_of_the_video(cut_corpus: Corpus) -> None:
    run(cut_corpus)
    shown = choose(
        read_answers(cut_corpus.config.output, STORAGE), ShowConfig(output=cut_corpus.config.output)
    )
    spans = [span(row) for row in shown.to_pylist()]
    assert spans == [
        "",
        *("  0 s to 4 s", "  4 s to 8 s", "  8 s to 12 s", "  12 s to 15.5 s"),
        "",
    ]
