"""The stores together, run after run, on a disk and on an S3 server; towers and model are faked."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from jobs import show_answers
from pipeline import rows
from pipeline.answer_index import AnswerIndex
from pipeline.answers import list_output, read_answers
from pipeline.cache_keys import renew_keys
from pipeline.compact_answers import compact_answers
from pipeline.config import AnswerConfig, StorageConfig
from pipeline.errors import StartupError
from pipeline.storage import Storage, join
from pipeline.token_cache import CacheIndex, find_folders, list_folder
from pipeline.verify import verify_output
from tests.pipeline.corpus import STORAGE, Corpus

GOOD = [("a b#1?%20ä.mp4", "ok"), ("b.mp4", "ok"), ("broken.mp4", "failed")]


def test_a_second_run_tries_only_the_failure_again(corpus: Corpus) -> None:
    first = corpus.run()
    assert first is not None
    assert (first.videos_ok, first.videos_failed, first.cache_hits) == (2, 1, 0)
    assert corpus.seen() == GOOD
    corpus.compressed, corpus.asked = [], []
    second = corpus.run()
    assert second is not None
    assert corpus.compressed == ["broken.mp4"]
    assert corpus.asked == []
    assert (second.source.answered, second.videos, second.videos_failed) == (2, 1, 1)
    assert corpus.seen() == GOOD
    (row,) = [
        row for row in read_answers(corpus.config.output, STORAGE).to_pylist() if row["error_type"]
    ]
    assert row["attempts"] == 2


def test_what_fails_for_good_is_not_tried_again_but_stays_a_row(corpus: Corpus) -> None:
    corpus.broken = "truncated"
    corpus.run()
    corpus.compressed = []
    second = corpus.run()
    assert second is not None
    assert corpus.compressed == []
    assert (second.source.answered, second.source.given_up, second.videos) == (2, 1, 0)
    assert corpus.seen() == GOOD
    # Another question about it fails with the error that is known, without decoding.
    third = corpus.run(answer=AnswerConfig(prompt="Who?"))
    assert third is not None
    assert corpus.compressed == []
    assert (third.source.failed, third.failed_by_type) == (1, {"truncated": 1})
    assert corpus.seen() == sorted(GOOD * 2)
    # Until it changes.
    corpus.put("videos/sub/broken.mp4", b"mended, or at least another file")
    corpus.run()
    assert corpus.compressed == ["broken.mp4"]


def test_a_costly_failure_is_tried_a_number_of_times(corpus: Corpus) -> None:
    corpus.broken = "decode_crash"
    for _ in range(5):
        corpus.run()
    assert corpus.compressed.count("broken.mp4") == 3
    assert corpus.seen() == GOOD


def test_nights_of_trouble_with_the_store_do_not_count(corpus: Corpus) -> None:
    nights = ["forbidden", "forbidden", "decode_timeout", "storage_error", "decode_crash"]
    tries, attempts = [], []
    for night in [*nights, "forbidden", "decode_timeout", "decode_timeout", "decode_timeout"]:
        corpus.broken, corpus.compressed = night, []
        corpus.run()
        tries.append(corpus.compressed.count("broken.mp4"))
        attempts.append(max(row["attempts"] for row in _failures(corpus)))
        later = datetime.now(UTC) + timedelta(days=1)
        output = corpus.config.output
        compact_answers(STORAGE, output, target_bytes=1 << 20, grace_s=0.0, now=later)
    assert tries == [1, 1, 1, 1, 1, 1, 1, 0, 0]  # up to the third costly one
    assert attempts == [1, 1, 1, 2, 2, 3, 3, 3, 3]


def test_a_question_that_kills_the_engine_counts_for_itself(corpus: Corpus) -> None:
    answer = corpus.answer
    asked: list[tuple[str, str]] = []

    def dying(block: pa.Table) -> pa.Table:
        answered = answer(block).to_pylist()
        for row in answered:
            if row["uri"].endswith("b.mp4") and row["error_type"] is None:
                asked.append((row["uri"][-5:], row["prompts"][0]["prompt"]))
                row["answers"] = [
                    {"prompt_id": each["prompt_id"], "error_type": "engine_died"}
                    for each in row["prompts"]
                ]
        return rows.build(answered, rows.ANSWERED)

    corpus.answer = dying  # type: ignore[method-assign]
    for prompt in ("Who?", "What?"):
        asked.clear()
        for _ in range(5):
            corpus.run(answer=AnswerConfig(prompt=prompt))
        assert asked == [("b.mp4", prompt)] * 3


def _failures(corpus: Corpus) -> list[dict[str, Any]]:
    table = read_answers(corpus.config.output, STORAGE)
    return [row for row in table.to_pylist() if row["status"] == "failed"]


def test_another_question_reads_the_tokens_and_compresses_nothing(corpus: Corpus) -> None:
    corpus.run()
    corpus.compressed, corpus.asked = [], []
    report = corpus.run(answer=AnswerConfig(prompt="Who?"))
    assert report is not None
    assert corpus.compressed == ["broken.mp4"]
    assert sorted(corpus.asked) == [("a b#1?%20ä.mp4", "Who?"), ("b.mp4", "Who?")]
    assert report.cache_hits == 2
    assert len(corpus.seen()) == 6


def test_other_answer_settings_ask_again(corpus: Corpus) -> None:
    corpus.run()
    corpus.asked = []
    corpus.run(answer=AnswerConfig(max_new_tokens=5))
    assert len(corpus.asked) == 2
    assert corpus.seen() == GOOD


def test_a_killed_run_is_adopted_by_the_next(corpus: Corpus) -> None:
    corpus.run(killed=True)
    assert corpus.seen() == []
    corpus.compressed, corpus.asked = [], []
    report = corpus.run()
    assert report is not None
    assert (report.source.answered, corpus.asked) == (2, [])
    assert corpus.seen() == GOOD


def test_half_written_files_of_a_killed_run_are_adopted_by_nobody(corpus: Corpus) -> None:
    corpus.run(killed=True)
    found, _ = list_output(corpus.config.output, STORAGE)
    assert {uri.rpartition("/")[2].partition("-")[0] for uri in found} == {"answers", "videos"}
    for uri in found:
        data = STORAGE.read(uri)
        STORAGE.write(uri.replace(".parquet", "-copy.parquet"), data[: len(data) // 2])
    corpus.run()
    assert corpus.seen() == GOOD
    assert list(verify_output(STORAGE, corpus.config.output)) == []


def test_a_changed_video_is_done_again_and_its_old_answer_gone(corpus: Corpus) -> None:
    corpus.run()
    corpus.compressed = []
    corpus.put("videos/b.mp4", b"another video")
    corpus.run()
    assert sorted(corpus.compressed) == ["b.mp4", "broken.mp4"]
    assert corpus.seen() == GOOD


def _ask_by_key(corpus: Corpus, prompt: str) -> None:
    """Name b.mp4 by its key, in a table that lies elsewhere than the videos."""
    seen = read_answers(corpus.config.output, STORAGE).to_pylist()
    (video_key,) = {row["video_key"] for row in seen if row["uri"].endswith("/b.mp4")}
    line = json.dumps({"video_key": video_key, "prompt_id": "who", "prompt": prompt})
    corpus.put("asked/questions.jsonl", line.encode())
    corpus.config = replace(corpus.config, source=join(corpus.root, "asked/questions.jsonl"))
    corpus.compressed, corpus.asked = [], []


def test_a_video_is_named_by_its_key(corpus: Corpus) -> None:
    corpus.run()
    _ask_by_key(corpus, "Who?")
    report = corpus.run()
    assert report is not None
    assert (corpus.asked, corpus.compressed) == ([("b.mp4", "Who?")], [])
    assert report.cache_hits == 1
    report = corpus.run()
    assert report is not None
    assert (report.videos, report.source.answered) == (0, 1)
    assert corpus.seen() == sorted([*GOOD, ("b.mp4", "ok")])


def test_a_key_of_an_object_that_has_changed_is_refused(corpus: Corpus) -> None:
    corpus.run()
    _ask_by_key(corpus, "Who?")
    corpus.put("videos/b.mp4", b"another video")
    report = corpus.run()
    assert report is not None
    assert (report.failed_by_type, corpus.asked) == ({"bad_manifest_row": 1}, [])
    assert "older" in report.examples[0].message
    assert set(GOOD) <= set(corpus.seen())  # what was answered about the old one stays for now


def test_a_key_of_an_object_that_is_away_is_answered_from_the_cache(
    corpus: Corpus,
) -> None:
    corpus.run()
    _ask_by_key(corpus, "Who?")
    STORAGE.delete(join(corpus.root, "videos/b.mp4"))
    corpus.run()
    assert corpus.asked == [("b.mp4", "Who?")]


@pytest.mark.parametrize("first", [0, 1])
def test_two_versions_of_a_video_are_not_asked_together(corpus: Corpus, first: int) -> None:
    versions = []
    for content in (b"b.mp4", b"B.mp4"):
        corpus.put("videos/b.mp4", content)
        corpus.run()
        seen = read_answers(corpus.config.output, STORAGE).to_pylist()
        versions += [row["video_key"] for row in seen if row["uri"].endswith("b.mp4")]
    assert len(set(versions)) == 2
    STORAGE.delete(join(corpus.root, "videos/b.mp4"))  # now nothing says which is the current one
    asked, other = versions[first], versions[1 - first]
    lines = f"video_key,prompt\n{asked},Who?\n{other},What?\n{asked},Where?\n"
    corpus.put("videos/asked.csv", lines.encode())
    source = join(corpus.root, "videos/asked.csv")
    corpus.config = replace(corpus.config, source=source)
    corpus.asked = []
    report = corpus.run()
    assert report is not None
    assert corpus.asked == [("b.mp4", "Who?"), ("b.mp4", "Where?")]
    answers = read_answers(corpus.config.output, STORAGE).to_pylist()
    keys_of = {row["prompt"]: row["video_key"] for row in answers if row["status"] == "ok"}
    assert (keys_of["Who?"], keys_of["Where?"]) == (asked, asked)
    [example] = report.examples
    assert (example.uri, example.error_type) == (f"{source}#line 3", "bad_manifest_row")
    assert asked in example.message
    assert other in example.message


def test_a_key_is_found_in_the_cache_when_the_answers_are_gone(corpus: Corpus) -> None:
    corpus.run()
    _ask_by_key(corpus, "Who?")
    for info in list(STORAGE.list(corpus.config.output)):
        if "/cache/" not in info.uri:
            STORAGE.delete(info.uri)
    corpus.run()
    assert corpus.asked == [("b.mp4", "Who?")]
    assert corpus.seen() == [("b.mp4", "ok")]


def test_a_key_is_found_in_the_cache_when_a_videos_file_is_lost(corpus: Corpus) -> None:
    corpus.run()
    found, _ = list_output(corpus.config.output, STORAGE)
    (videos,) = [uri for uri in found if "/videos-" in uri]
    _ask_by_key(corpus, "Who?")
    STORAGE.delete(videos)
    corpus.run()
    assert corpus.asked == [("b.mp4", "Who?")]


def test_a_key_whose_cache_file_is_broken_is_found_in_the_answers(corpus: Corpus) -> None:
    corpus.run()
    (folder,) = find_folders(STORAGE, corpus.config.cache_root)
    found = list_folder(STORAGE, folder)
    renew_keys(STORAGE, folder, found.files, found.key_files)  # these go on offering it
    for file in found.files:
        STORAGE.write(file, STORAGE.read(file)[:-20])
    _ask_by_key(corpus, "Who?")
    report = corpus.run()
    assert report is not None
    assert (report.failed_by_type, corpus.compressed) == ({"cache_corrupt": 1}, [])
    corpus.run()
    assert (corpus.asked, corpus.compressed) == ([("b.mp4", "Who?")], ["b.mp4"])


def test_failures_are_shown_by_the_command_the_report_names(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = corpus.run()
    assert report is not None
    command = report.see_failures.split()
    assert command[0] == "python"
    monkeypatch.setattr("sys.argv", command[1:])
    assert show_answers.main() == 0
    shown = capsys.readouterr()
    uri = join(corpus.config.source, "sub/broken.mp4")
    assert shown.out.splitlines() == [
        uri,
        f"    decode_timeout in decode: {uri}: cut",
        "1 of 1 answers shown",
    ]


def test_a_bucket_that_cannot_be_had_is_said_at_the_start(
    on_s3: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("s3://no-such-bucket-here/videos", join(on_s3.root, "no-such-prefix")):
        on_s3.config = replace(on_s3.config, source=source)
        with pytest.raises(StartupError, match=f"source={source}: .*does not exist"):
            on_s3.run()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = Storage(StorageConfig(attempts=1))
    with pytest.raises(StartupError, match=r"output=.*access refused"):
        AnswerIndex(refused, on_s3.config.output, fingerprint="f")
    with pytest.raises(StartupError, match=r"cache\.path.*access refused"):
        CacheIndex(refused, on_s3.config.cache_root)
