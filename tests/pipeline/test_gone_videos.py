"""Objects that are deleted at the source: reported, removed on demand, and never by mistake."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline import rows
from pipeline.answer_index import AnswerIndex
from pipeline.answers import list_output, read_answers
from pipeline.compact_answers import compact_answers
from pipeline.compact_cache import compact_cache
from pipeline.config import AnswerConfig, ListingConfig, SyncConfig
from pipeline.errors import StartupError
from pipeline.gone_videos import RollCall
from pipeline.known_videos import find_videos
from pipeline.parquet import read_columns
from pipeline.report import Report, render
from pipeline.storage import Storage, StorageError, join
from pipeline.token_cache import CacheIndex, find_folders
from pipeline.verify import verify_cache, verify_output
from tests.pipeline.corpus import STORAGE, Corpus

A, B, BROKEN = ("a b#1?%20ä.mp4", "ok"), ("b.mp4", "ok"), ("broken.mp4", "failed")


def _run(corpus: Corpus, **options: Any) -> Report:
    report = corpus.run(**options)
    assert report is not None
    return report


def _delete(corpus: Corpus, name: str) -> None:
    STORAGE.delete(join(corpus.root, "videos", name))


def _set(corpus: Corpus, **sync: Any) -> None:
    corpus.config = replace(corpus.config, sync=SyncConfig(**sync))


def _num_tokens(corpus: Corpus) -> int:
    (folder,) = find_folders(STORAGE, corpus.config.cache_root)
    return len(CacheIndex(STORAGE, folder))


def _faults(corpus: Corpus) -> list[str]:
    (folder,) = find_folders(STORAGE, corpus.config.cache_root)
    return [*verify_output(STORAGE, corpus.config.output), *verify_cache(STORAGE, folder)]


def test_what_is_gone_is_reported_and_stays(corpus: Corpus) -> None:
    assert _run(corpus).gone == 0
    _delete(corpus, "b.mp4")
    report = _run(corpus)
    uri = join(corpus.root, "videos/b.mp4")
    assert (report.gone, report.removed, report.gone_examples) == (1, 0, [uri])
    shown = render(report)
    assert "1 known videos are gone from the source; sync.delete=true removes" in shown
    assert uri in shown
    table = read_columns(STORAGE, join(report.output, report.run_id, "gone.parquet"))
    assert table.to_pylist() == [{"uri": uri, "removed": False}]
    assert corpus.seen() == [A, B, BROKEN]
    assert _num_tokens(corpus) == 2


def test_what_is_gone_is_removed_when_that_is_asked_for(corpus: Corpus) -> None:
    _run(corpus)
    _run(corpus, answer=AnswerConfig(prompt="Who?"))
    _delete(corpus, "b.mp4")
    _set(corpus, delete=True, max_share=0.5)
    report = _run(corpus)
    assert (report.gone, report.removed) == (1, 1)
    assert corpus.seen() == [A, A, BROKEN, BROKEN]
    assert _num_tokens(corpus) == 1
    assert _faults(corpus) == []
    report = _run(corpus)
    assert (report.gone, report.removed) == (0, 0)


@pytest.mark.parametrize("content", [None, b"PAR1 no longer"])
def test_a_videos_file_that_is_lost_or_damaged_is_said_and_costs_no_run(
    corpus: Corpus, content: bytes | None
) -> None:
    _run(corpus)
    found, _ = list_output(corpus.config.output, STORAGE)
    (videos,) = [uri for uri in found if "/videos-" in uri]
    STORAGE.delete(videos)
    if content:
        STORAGE.write(videos, content)
    _delete(corpus, "b.mp4")
    _set(corpus, delete=True, max_share=0.5)
    report = _run(corpus)  # readers see what was answered about it, so it is known
    assert (corpus.unreadable, report.gone, report.removed) == ([videos], 1, 1)
    assert corpus.seen() == [A, BROKEN]
    assert _num_tokens(corpus) == 1  # though no videos file names its own
    assert _run(corpus).gone == 0
    assert corpus.unreadable == [videos]
    options: dict[str, Any] = {"target_bytes": 1 << 30, "grace_s": 0.0, "now": datetime.now(UTC)}
    compact_answers(STORAGE, corpus.config.output, drop_unreadable=True, **options)
    _run(corpus)
    assert corpus.unreadable == []


@pytest.mark.parametrize("error_type", ["forbidden", "storage_error"])
def test_a_store_that_refuses_has_lost_nothing(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, error_type: str
) -> None:
    _run(corpus)

    def refuse(_storage: Storage, uri: str, _columns: Sequence[str] | None = None) -> Any:
        raise StorageError(error_type, f"{uri}: not now")

    for module in ("answer_index", "gone_videos", "known_videos"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.{module}.read_columns", refuse)
            if module != "known_videos":
                with pytest.raises(StorageError, match="not now"):
                    _run(corpus)
    monkeypatch.setattr("pipeline.known_videos.read_columns", refuse)
    with pytest.raises(StorageError, match="not now"):
        find_videos(STORAGE, corpus.config.output, CacheIndex(STORAGE, "none"), ["0" * 64])


def test_an_object_that_comes_back_is_answered_again(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=0.5)
    _delete(corpus, "b.mp4")
    _run(corpus)
    corpus.put("videos/b.mp4", b"b.mp4")
    corpus.compressed, corpus.asked = [], []
    _run(corpus)
    assert [name for name, _ in corpus.asked] == ["b.mp4"]
    assert corpus.seen() == [A, B, BROKEN]
    corpus.asked = []
    _run(corpus)
    assert corpus.asked == []


def test_compaction_erases_what_was_removed(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=0.5)
    _delete(corpus, "b.mp4")
    _run(corpus)
    (folder,) = find_folders(STORAGE, corpus.config.cache_root)
    later = datetime.now(UTC) + timedelta(days=9)
    for _ in range(3):
        # Files of any size: the target is smaller than all of them.
        options: dict[str, Any] = {"target_bytes": 1, "grace_s": 0.0, "now": later}
        compact_answers(STORAGE, corpus.config.output, **options)
        compact_cache(STORAGE, folder, **options)
        assert corpus.seen() == [A, BROKEN]
    found, _ = list_output(corpus.config.output, STORAGE)
    answers = [uri for uri in found if "/answers-" in uri]
    for uri in answers:
        stored = read_columns(STORAGE, uri)
        assert not [u for u in stored.column("uri").to_pylist() if u.endswith("/b.mp4")]
        assert "deleted" not in stored.column("status").to_pylist()
    for info in STORAGE.list(folder, suffixes=(".parquet",)):
        if "/part-" in info.uri:
            uris = read_columns(STORAGE, info.uri, ["uri"]).column("uri").to_pylist()
            assert not [uri for uri in uris if uri.endswith("/b.mp4")]
    assert not [info for info in STORAGE.list(folder) if "/bad-" in info.uri]
    assert _faults(corpus) == []
    assert _run(corpus).gone == 0


def test_tokens_left_by_a_run_that_was_killed_are_removed_by_the_next(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=0.5)
    _delete(corpus, "b.mp4")
    _run(corpus, killed_behind_commit=True)
    assert (corpus.seen(), _num_tokens(corpus)) == ([A, BROKEN], 2)
    assert _run(corpus).removed == 1
    assert (corpus.seen(), _num_tokens(corpus)) == ([A, BROKEN], 1)
    assert _run(corpus).gone == 0


def test_more_than_the_share_removes_nothing(corpus: Corpus) -> None:
    _run(corpus)
    _delete(corpus, "b.mp4")
    _set(corpus, delete=True)
    report = _run(corpus)
    assert (report.gone, report.removed) == (1, 0)
    (warning,) = report.warnings
    assert "1 of 3 known videos are gone (33%), more than sync.max_share=0.2" in warning
    assert corpus.seen() == [A, B, BROKEN]
    # The run that the warning names does it.
    _set(corpus, delete=True, max_share=float(warning.rpartition("=")[2]))
    assert _run(corpus).removed == 1


def test_a_manifest_removes_nothing(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=1.0)
    line = json.dumps({"uri": join(corpus.root, "videos/b.mp4")})
    corpus.put("few.jsonl", line.encode())
    corpus.config = replace(corpus.config, source=join(corpus.root, "few.jsonl"))
    report = _run(corpus)
    assert (report.gone, report.removed) == (0, 0)
    assert corpus.seen() == [A, B, BROKEN]


def test_another_prefix_and_other_endings_remove_nothing(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=1.0)
    corpus.put("videos/c.mkv", b"c")
    whole = replace(corpus.config, listing=ListingConfig(extensions=[".mp4"]))
    for source in ("videos/sub", "videos"):
        corpus.config = replace(whole, source=join(corpus.root, source))
        assert _run(corpus).gone == 0
    # b.mp4 is no video any more, by its name; it is there all the same.
    corpus.config = replace(whole, listing=ListingConfig(extensions=[".mkv"]))
    assert _run(corpus).gone == 0
    _delete(corpus, "b.mp4")
    corpus.config = replace(whole, source=join(corpus.root, "videos/sub"))
    assert _run(corpus).gone == 0
    assert corpus.seen() == [A, B, BROKEN, ("c.mkv", "ok")]


def test_a_prefix_that_is_empty_or_mistyped_stops_the_run(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=1.0)
    for name in ("a b#1?%20ä.mp4", "b.mp4", "sub/broken.mp4"):
        _delete(corpus, name)
    with pytest.raises(StartupError, match="source="):
        corpus.run()
    corpus.config = replace(corpus.config, source=join(corpus.root, "videso"))
    with pytest.raises(StartupError, match="source="):
        corpus.run()
    assert corpus.seen() == [A, B, BROKEN]


def test_a_listing_that_lacks_what_is_there_removes_nothing(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=1.0)
    whole = Storage.list

    def partial(self: Storage, prefix: str, **options: Any) -> Any:
        listed = list(whole(self, prefix, **options))
        yield from listed[:1] if prefix == corpus.config.source else listed

    monkeypatch.setattr(Storage, "list", partial)
    report = _run(corpus)
    assert (report.gone, report.removed) == (2, 0)
    assert "2 videos were not in the listing but are in the store" in report.warnings[0]
    assert corpus.seen() == [A, B, BROKEN]


def test_a_listing_that_breaks_off_stops_the_run(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=1.0)
    whole = Storage.list

    def broken(self: Storage, prefix: str, **options: Any) -> Any:
        listed = list(whole(self, prefix, **options))
        if prefix != corpus.config.source:
            yield from listed
            return
        yield listed[0]
        raise StorageError("storage_error", "the connection broke")

    monkeypatch.setattr(Storage, "list", broken)
    with pytest.raises(StartupError, match="cannot be listed"):
        corpus.run()
    assert corpus.seen() == [A, B, BROKEN]


def test_a_moved_file_that_is_keyed_by_its_content_is_not_gone(on_disk: Corpus) -> None:
    on_disk.config = replace(on_disk.config, listing=ListingConfig(hash_content=True))
    _run(on_disk)
    _set(on_disk, delete=True, max_share=1.0)
    folder = Path(on_disk.root, "videos")
    (folder / "b.mp4").rename(folder / "sub" / "b.mp4")
    assert _run(on_disk).gone == 0
    assert on_disk.seen() == [A, B, BROKEN]


def test_a_failure_that_a_manifest_brings_about_a_deleted_video_is_seen(corpus: Corpus) -> None:
    _run(corpus)
    _set(corpus, delete=True, max_share=0.5)
    _delete(corpus, "b.mp4")
    _run(corpus)
    corpus.put("one.jsonl", json.dumps({"uri": join(corpus.root, "videos/b.mp4")}).encode())
    corpus.config = replace(corpus.config, source=join(corpus.root, "one.jsonl"))
    report = _run(corpus)
    assert report.failed_by_type == {"not_found": 1}
    assert corpus.seen() == [A, ("b.mp4", "failed"), BROKEN]


def test_a_roll_call_knows_any_name() -> None:
    key = "ab" * 32
    names = ["/v/a.mp4", "/v/ü.mp4", "/v/\\udcff.mp4", "/other/a.mp4"]
    table = rows.ANSWERS.empty_table().select(["uri", "video_key"])
    table = type(table).from_pylist(
        [{"uri": name, "video_key": f"{n:064x}"} for n, name in enumerate(names)], table.schema
    )
    roll_call = RollCall([table], "/v/")
    assert len(roll_call) == 3
    assert roll_call.absent() == sorted(names[:3])
    roll_call.name("/v/a.mp4")
    roll_call.name("/v/\udcff.mp4")  # as a listing spells a name that is not UTF-8
    roll_call.recognise([key, f"{3:064x}"])
    assert roll_call.absent() == ["/v/ü.mp4"]


def test_latest_wins_whatever_the_clocks_say(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        ahead = timedelta()

        @classmethod
        def now(cls, zone: Any) -> datetime:
            return datetime.now(zone) + cls.ahead

    for module in ("pipeline.stages.sink", "pipeline.gone_videos"):
        monkeypatch.setattr(f"{module}.datetime", Clock)
    _set(corpus, delete=True, max_share=0.5)
    Clock.ahead = timedelta(days=400)
    _run(corpus)
    Clock.ahead = timedelta(days=-400)
    corpus.put("videos/b.mp4", b"other")  # its tokens are those of its name again
    _run(corpus)
    newer = {row["uri"]: row for row in read_answers(corpus.config.output, STORAGE).to_pylist()}
    done = AnswerIndex(STORAGE, corpus.config.output, fingerprint="")
    uri = join(corpus.config.source, "b.mp4")
    assert newer[uri]["created_at"] + timedelta(microseconds=1) == done.not_before
    _delete(corpus, "b.mp4")
    assert _run(corpus).removed == 1
    assert corpus.seen() == [A, BROKEN]
    corpus.put("videos/b.mp4", b"b.mp4")
    _run(corpus)
    assert corpus.seen() == [A, B, BROKEN]
    corpus.asked = []
    _run(corpus)
    assert corpus.asked == []
