import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import key_index, keys, rows, spilled_rows
from pipeline.answer_index import AnswerIndex
from pipeline.config import CaptionConfig, ListingConfig, MediaConfig, StorageConfig
from pipeline.errors import StartupError
from pipeline.gone_videos import RollCall, known_videos
from pipeline.stages import source
from pipeline.stages.cache import WriteCache
from pipeline.stages.source import WorkCounts, WorkList, list_work
from pipeline.storage import ObjectInfo, Storage, StorageError
from pipeline.token_cache import HITS, CacheIndex

STORAGE = Storage(StorageConfig())
FINGERPRINT = "f" * 64
DEFAULT = CaptionConfig(source="x", output="y").answer.prompt


class Corpus:
    """A folder of videos, with what earlier runs left of it."""

    def __init__(self, root: Path) -> None:
        self.videos = root / "videos"
        self.output = root / "output"
        self.cache = root / "cache"
        self.videos.mkdir()

    def add(self, name: str, content: bytes = b"video") -> str:
        path = self.videos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        return str(path)

    def key(self, name: str) -> str:
        return keys.video_key(STORAGE.stat(str(self.videos / name)), root=str(self.videos))

    def manifest(self, name: str, lines: Sequence[Mapping[str, Any] | str]) -> str:
        path = self.videos / name
        path.write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        )
        return str(path)

    def work(
        self, named: str = "", *, storage: Storage = STORAGE, listing: ListingConfig | None = None
    ) -> WorkList:
        config = CaptionConfig(
            source=named or str(self.videos),
            output=str(self.output),
            listing=listing or ListingConfig(),
        )
        return list_work(
            config,
            storage,
            done=AnswerIndex(STORAGE, str(self.output), fingerprint=FINGERPRINT),
            cached=CacheIndex(STORAGE, str(self.cache)),
            folder=str(self.output / "run"),
        )

    def answer(self, key: str, prompt_id: str, prompt: str, **columns: Any) -> None:
        """Leave one answer of an earlier run."""
        row = {
            "video_key": key,
            "uri": key,
            "prompt_id": prompt_id,
            "prompt": prompt,
            "status": "ok",
            "attempts": 1,
            "fingerprint": FINGERPRINT,
            "created_at": datetime.now(UTC),
            **columns,
        }
        folder = self.output / "earlier"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"answers-{len(list(folder.iterdir()))}.parquet"
        pq.write_table(rows.build([row], rows.ANSWERS), folder / name)

    def cached(self, key: str) -> None:
        """Leave the (empty) tokens of a video in the cache."""
        tokens = {
            "video_key": key,
            "tokens": b"",
            "token_dtype": "float32",
            "token_shape": [0, 4],
            "positions": [[], [], []],
            "modality": [],
            "next_position": 0,
            "kept_index": [],
        }
        WriteCache(STORAGE, str(self.cache), "run")(rows.build([tokens], rows.KEPT))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def _rows(parts: Sequence[str]) -> list[dict[str, Any]]:
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def _names(parts: Sequence[str]) -> list[str]:
    return [Path(row["uri"]).name for row in _rows(parts)]


def _asked(parts: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    return {
        Path(row["uri"]).name: [(ask["prompt_id"], ask["prompt"]) for ask in row["prompts"]]
        for row in _rows(parts)
    }


def test_a_prefix_is_listed_by_extension_whatever_its_case(corpus: Corpus) -> None:
    for name in ("b.MP4", "a.webm", "deep/c d#1?%20ä.mov", "notes.txt", "mp4"):
        corpus.add(name)
    work = corpus.work()
    assert sorted(_names(work.fresh)) == ["a.webm", "b.MP4", "c d#1?%20ä.mov"]
    assert work.counts == WorkCounts(videos=3, fresh=3, prompts=3)
    assert (work.cached, work.failed) == ((), ())
    row = next(row for row in _rows(work.fresh) if row["uri"].endswith("b.MP4"))
    assert row == {
        "video_key": corpus.key("b.MP4"),
        "object_key": corpus.key("b.MP4"),
        "uri": str(corpus.videos / "b.MP4"),
        "size_bytes": 5,
        "etag": "",
        "prompts": [{"prompt_id": keys.prompt_id(DEFAULT), "prompt": DEFAULT, "choices": None}],
        "attempts": 1,
        "window_s": None,
        "start_s": None,
        "windows": None,
        "skip_windows": None,
        "error_stage": None,
        "error_type": None,
        "error_message": None,
    }
    assert pq.read_schema(work.fresh[0]).equals(rows.IDENTITY)


class _Bucket(Storage):
    """An object store that counts what it is asked."""

    def __init__(self, objects: Mapping[str, str], refused: Sequence[str] = ()) -> None:
        super().__init__(StorageConfig())
        self.objects, self.refused = objects, refused
        self.heads = 0

    def list(self, prefix: str, *, suffixes: Sequence[str] = ()) -> Iterator[ObjectInfo]:
        assert not suffixes
        for uri, etag in self.objects.items():
            if uri.startswith(prefix):
                yield ObjectInfo(uri, 7, etag, 0)

    def stat(self, uri: str) -> ObjectInfo:
        self.heads += 1
        if uri in self.refused:
            raise StorageError("forbidden", f"{uri}: access refused")
        if uri not in self.objects:
            raise StorageError("not_found", f"{uri}: does not exist")
        return ObjectInfo(uri, 7, self.objects[uri], 0)


def test_a_listing_needs_no_request_an_object(corpus: Corpus) -> None:
    bucket = _Bucket({"s3://b/v/1.mp4": "e1", "s3://b/v/2.mp4": "e2"})
    work = corpus.work("s3://b/v", storage=bucket)
    assert [row["etag"] for row in _rows(work.fresh)] == ["e1", "e2"]
    assert bucket.heads == 0


def test_a_single_missing_or_forbidden_object_is_a_failed_row(corpus: Corpus) -> None:
    bucket = _Bucket({"s3://b/good.mp4": "e"}, refused=["s3://c/secret.mp4"])
    uris = ["s3://b/good.mp4", "s3://b/gone.mp4", "s3://c/secret.mp4"]
    manifest = corpus.manifest("m.jsonl", [{"uri": uri} for uri in uris])
    work = corpus.work(manifest, storage=bucket)
    assert _names(work.fresh) == ["good.mp4"]
    found = {row["uri"]: row for row in _rows(work.failed)}
    assert {uri: row["error_type"] for uri, row in found.items()} == {
        "s3://b/gone.mp4": "not_found",
        "s3://c/secret.mp4": "forbidden",
    }
    for uri, row in found.items():
        assert row["video_key"] == keys.missing_key(uri)
        assert row["error_stage"] == "source"
        assert uri in row["error_message"]
        assert len(row["prompts"]) == 1
    assert pq.read_schema(work.failed[0]).equals(HITS)
    assert work.counts == WorkCounts(videos=3, fresh=1, failed=2, prompts=3)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "CSV"])
def test_prompts_of_a_video_are_grouped_in_every_format(corpus: Corpus, suffix: str) -> None:
    for name in ("a.mp4", "b.mp4", "sub/ü ,c.mp4"):
        corpus.add(name)
    lines: list[dict[str, str | None]] = [
        {"uri": "b.mp4", "prompt": "What?", "prompt_id": "w"},
        {"uri": "a.mp4", "prompt": None, "prompt_id": None},
        {"uri": "./b.mp4", "prompt": 'Who said "no",\nand why?', "prompt_id": None},
        {"uri": str(corpus.videos / "b.mp4"), "prompt": "What?", "prompt_id": "w"},  # again
        {"uri": "sub/ü ,c.mp4", "prompt": "", "prompt_id": "d"},
    ]
    manifest = corpus.videos / f"m.{suffix}"
    table = pa.Table.from_pylist([{**line, "other": 1} for line in lines])
    if suffix == "parquet":
        pq.write_table(table, manifest, row_group_size=2)
    elif suffix == "jsonl":
        manifest.write_text("\n\n".join(json.dumps(line) for line in lines))
    else:
        quoted = [
            ",".join('"' + (line[name] or "").replace('"', '""') + '"' for name in line)
            for line in lines
        ]
        manifest.write_text("\ufeff" + "\r\n".join(["uri,prompt,prompt_id", *quoted]))
    work = corpus.work(str(manifest))
    second = 'Who said "no",\nand why?'
    assert _asked(work.fresh) == {
        "a.mp4": [(keys.prompt_id(DEFAULT), DEFAULT)],
        "b.mp4": [("w", "What?"), (keys.prompt_id(second), second)],
        "ü ,c.mp4": [("d", DEFAULT)],
    }
    assert work.counts == WorkCounts(videos=3, fresh=3, prompts=4, duplicates=1)
    assert {row["video_key"] for row in _rows(work.fresh)} == {
        corpus.key(name) for name in ("a.mp4", "b.mp4", "sub/ü ,c.mp4")
    }


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_choices_are_read_from_every_format(corpus: Corpus, suffix: str) -> None:
    corpus.add("a.mp4")
    given: dict[str, Any] = {"bars": "yes | no", "json": '["a|b", "c"]', "none": ""}
    given["list"] = '["7", "8", "9"]' if suffix == "csv" else ["7", "8", "9"]
    if suffix == "parquet":  # one type a column
        given |= {"bars": ["yes", "no"], "json": ["a|b", "c"], "none": None}
    lines = [
        {"uri": "a.mp4", "prompt": "What?", "prompt_id": name, "choices": choices}
        for name, choices in given.items()
    ]
    manifest = corpus.videos / f"m.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), manifest)
    elif suffix == "jsonl":
        manifest.write_text("\n".join(json.dumps(line) for line in lines))
    else:
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    work = corpus.work(str(manifest))
    [row] = _rows(work.fresh)
    assert {ask["prompt_id"]: ask["choices"] for ask in row["prompts"]} == {
        "bars": ["yes", "no"],
        "json": ["a|b", "c"],
        "none": None,
        "list": ["7", "8", "9"],
    }


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", "at least two different"),
        ("yes|yes ", "at least two different"),
        ("yes||no", "empty"),
        ('["yes", ', "not a JSON list"),
        ("[1, 2]", "not a list of strings"),
        (["yes", 7], "not a list of strings"),
        ({"a": "b"}, "not a list of strings"),
        (["a", "\ud800"], "not UTF-8"),
    ],
)
def test_broken_choices_are_a_failed_row(corpus: Corpus, choices: object, message: str) -> None:
    corpus.add("a.mp4")
    manifest = corpus.videos / "m.jsonl"
    manifest.write_text(json.dumps({"uri": "a.mp4", "prompt": "What?", "choices": choices}))
    [failed] = _rows(corpus.work(str(manifest)).failed)
    assert failed["error_type"] == "bad_manifest_row"
    assert message in failed["error_message"]


def test_a_prompt_id_stands_for_one_set_of_choices(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    manifest = corpus.videos / "m.jsonl"
    line = {"uri": "a.mp4", "prompt": "What?", "choices": "x|y"}
    lines = [
        {**line, "prompt_id": "q"},
        {**line, "prompt_id": "q", "choices": "x|z"},
        {**line, "choices": "x|y"},
        {**line, "choices": "x|z"},
        {**line, "choices": None},
    ]
    manifest.write_text("\n".join(json.dumps(each) for each in lines))
    work = corpus.work(str(manifest))
    [row] = _rows(work.fresh)
    ids = [keys.prompt_id("What?", c) for c in (["x", "y"], ["x", "z"], None)]
    assert [ask["prompt_id"] for ask in row["prompts"]] == ["q", *ids]
    [failed] = _rows(work.failed)
    assert "other choices" in failed["error_message"]


def test_a_broken_line_of_json_is_a_failed_row_with_its_number(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    manifest = corpus.videos / "m.jsonl"
    lines = [
        b'{"uri": "a.mp4"}',
        b'{"uri": "a.mp4"',
        b"",
        b'{"prompt": "no uri"}',
        b'{"uri": 7}',
        b'["a.mp4"]',
        b'{"uri": "\xff.mp4"}',
        rb'{"uri": "\ud800.mp4"}',
        b'{"uri": "a.mp4", "prompt": ["x"]}',
        b'{"uri": "https://example.org/a.mp4"}',
        b'{"uri": "s3://user:secret@b/a.mp4"}',
        b'{"uri": "  "}',
        b"[" * 100_000,
        rb'{"uri": "a\u0000.mp4"}',
    ]
    manifest.write_bytes(b"\n".join(lines))
    work = corpus.work(str(manifest))
    failed = _rows(work.failed)
    broken = [number for number in range(2, len(lines) + 1) if number != 3]
    assert sorted(row["uri"] for row in failed) == sorted(f"{manifest}#line {n}" for n in broken)
    assert {row["error_type"] for row in failed} == {"bad_manifest_row"}
    assert all(row["uri"] in row["error_message"] for row in failed)
    assert "secret" not in str(failed)
    assert work.counts == WorkCounts(
        videos=13, fresh=1, failed=12, prompts=13, broken_lines=len(broken)
    )


def test_a_broken_line_of_csv_is_a_failed_row_with_its_number(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    manifest = corpus.videos / "m.csv"
    manifest.write_bytes(b"uri,prompt\na.mp4,\na.mp4\n\xff.mp4,x\n,y\na.mp4,x,y\n\n")
    work = corpus.work(str(manifest))
    assert _names(work.fresh) == ["a.mp4"]
    places = sorted(row["uri"].rpartition("#")[2] for row in _rows(work.failed))
    assert places == ["line 3", "line 4", "line 5", "line 6"]


def test_an_open_quote_of_csv_is_not_swallowed_unsaid(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    manifest = corpus.manifest("m.csv", ["uri,prompt", 'a.mp4,"x"y', "a.mp4,", '"b.mp4', "c.mp4,"])
    work = corpus.work(manifest)
    assert _names(work.fresh) == ["a.mp4"]
    places = sorted(row["uri"].rpartition("#")[2] for row in _rows(work.failed))
    assert places == ["line 2", "line 5"]


def test_a_null_uri_of_parquet_is_a_failed_row_with_its_number(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    pq.write_table(pa.table({"uri": ["a.mp4", None, ""]}), corpus.videos / "m.parquet")
    work = corpus.work(str(corpus.videos / "m.parquet"))
    places = [row["uri"].rpartition("#")[2] for row in _rows(work.failed)]
    assert places == ["row 2", "row 3"]


def test_one_id_for_two_prompts_of_a_video_is_a_broken_line(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    lines = [{"uri": "a.mp4", "prompt": p, "prompt_id": "q"} for p in ("x", "y")]
    work = corpus.work(corpus.manifest("m.jsonl", lines))
    assert _asked(work.fresh) == {"a.mp4": [("q", "x")]}
    (row,) = _rows(work.failed)
    assert row["uri"].endswith("m.jsonl#line 2")
    assert work.counts.broken_lines == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "does not exist"),
        ("m.csv", b"url,prompt\na.mp4,\n", "no column uri"),
        ("m.csv", b"", "no column uri"),
        ("m.parquet", b"not parquet", "cannot be read"),
        ("m.jsonl", b"", "empty"),
        ("m.csv", b"uri\n", "empty"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_said_at_the_start(
    corpus: Corpus, name: str, content: bytes | None, said: str
) -> None:
    manifest = corpus.videos / name
    if content is not None:
        manifest.write_bytes(content)
    with pytest.raises(StartupError, match=said) as error:
        corpus.work(str(manifest))
    assert f"source={manifest}" in str(error.value)


@pytest.mark.parametrize("columns", [{"url": ["a"]}, {"uri": [1]}, {"uri": ["a"], "prompt": [1]}])
def test_a_parquet_manifest_with_other_columns_is_said_at_the_start(
    corpus: Corpus, columns: dict[str, list[Any]]
) -> None:
    pq.write_table(pa.table(columns), corpus.videos / "m.parquet")
    with pytest.raises(StartupError, match="column"):
        corpus.work(str(corpus.videos / "m.parquet"))


def test_a_prefix_without_videos_is_said_at_the_start(corpus: Corpus) -> None:
    with pytest.raises(StartupError, match="there is no object") as empty:
        corpus.work()
    assert f"source={corpus.videos}" in str(empty.value)
    corpus.add("a.txt")
    with pytest.raises(StartupError, match=r"1 objects, but none ends in .*listing\.extensions"):
        corpus.work()
    with pytest.raises(StartupError, match=r"source=.*does not exist"):
        corpus.work(str(corpus.videos / "none"))


def test_credentials_in_the_source_are_refused_and_not_repeated(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"source holds credentials; .*environment") as error:
        corpus.work("s3://user:secret@b/v")
    assert "secret" not in str(error.value)


def test_videos_with_tokens_are_hits_that_know_where_they_lie(corpus: Corpus) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        corpus.add(name)
    for name in ("c.mp4", "a.mp4"):
        corpus.cached(corpus.key(name))
    work = corpus.work()
    assert _names(work.fresh) == ["b.mp4"]
    hits = _rows(work.cached)
    assert sorted(Path(row["uri"]).name for row in hits) == ["a.mp4", "c.mp4"]
    for row in hits:
        stored = pq.read_table(row["cache_file"], columns=["video_key"]).to_pylist()
        assert stored[row["cache_row"]]["video_key"] == row["video_key"]
    places = [(row["cache_file"], row["cache_row"]) for row in hits]
    assert places == sorted(places)
    assert work.counts == WorkCounts(videos=3, fresh=1, cached=2, prompts=3)


def test_only_what_is_not_answered_is_asked_again(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    corpus.add("b.mp4")
    asks = [("a.mp4", "p", "x"), ("a.mp4", "q", "y"), ("b.mp4", "p", "x"), ("a.mp4", "r", "z")]
    manifest = corpus.manifest(
        "m.jsonl", [{"uri": u, "prompt_id": i, "prompt": p} for u, i, p in asks]
    )
    corpus.answer(corpus.key("a.mp4"), "p", "x")
    corpus.answer(corpus.key("b.mp4"), "p", "x")
    corpus.answer(corpus.key("a.mp4"), "q", "another text")  # the same id, another question
    corpus.answer(corpus.key("a.mp4"), "r", "z", fingerprint="e" * 64)  # of another model
    work = corpus.work(manifest)
    assert _asked(work.fresh) == {"a.mp4": [("q", "y"), ("r", "z")]}
    assert work.counts == WorkCounts(videos=2, fresh=1, answered=1, prompts=2, prompts_answered=2)


def test_when_all_is_answered_nothing_is_written(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    corpus.answer(corpus.key("a.mp4"), keys.prompt_id(DEFAULT), DEFAULT)
    work = corpus.work()
    assert (work.fresh, work.cached, work.failed) == ((), (), ())
    assert work.counts == WorkCounts(videos=1, answered=1, prompts_answered=1)
    assert not (corpus.output / "run").exists()


def test_a_failed_video_is_tried_again_and_counted(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    prompt_id = keys.prompt_id(DEFAULT)
    for attempts in (2, 1):
        failure = {"status": "failed", "error_type": "decode_timeout", "attempts": attempts}
        corpus.answer(corpus.key("a.mp4"), prompt_id, DEFAULT, **failure)
    (row,) = _rows(corpus.work().fresh)
    assert row["attempts"] == 3


def test_a_changed_file_is_asked_again(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    corpus.answer(corpus.key("a.mp4"), keys.prompt_id(DEFAULT), DEFAULT)
    corpus.add("a.mp4", b"other video")
    assert _names(corpus.work().fresh) == ["a.mp4"]


def test_copies_are_answered_once_when_content_is_hashed(corpus: Corpus) -> None:
    for name, content in (("a.mp4", b"1"), ("b.mp4", b"2"), ("copy.mp4", b"1")):
        corpus.add(name, content)
    lines = [
        {"uri": "a.mp4", "prompt": "x", "prompt_id": "p"},
        {"uri": "b.mp4", "prompt": "x", "prompt_id": "p"},
        {"uri": "copy.mp4", "prompt": "x", "prompt_id": "p"},
        {"uri": "copy.mp4", "prompt": "y", "prompt_id": "q"},
    ]
    hashed = ListingConfig(hash_content=True)
    work = corpus.work(corpus.manifest("m.jsonl", lines), listing=hashed)
    assert _asked(work.fresh) == {"a.mp4": [("p", "x"), ("q", "y")], "b.mp4": [("p", "x")]}
    assert work.counts == WorkCounts(videos=2, fresh=2, prompts=3, duplicates=1)
    before = {row["video_key"] for row in _rows(work.fresh)}
    os.utime(corpus.videos / "a.mp4", ns=(5, 5))
    assert {row["video_key"] for row in _rows(corpus.work(listing=hashed).fresh)} == before


def test_a_name_that_is_no_utf8_is_a_failed_row(corpus: Corpus) -> None:
    corpus.add("a.mp4")
    corpus.add(os.fsdecode(b"\xff.mp4"))
    work = corpus.work()
    assert _names(work.fresh) == ["a.mp4"]
    (row,) = _rows(work.failed)
    assert row["error_type"] == "bad_name"


def test_large_lists_are_cut_into_parts(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_PART", 4)
    monkeypatch.setattr(source, "_CHUNK", 3)
    names = [f"{n:02}.mp4" for n in range(10)]
    for name in names:
        corpus.add(name)
    work = corpus.work(corpus.manifest("m.csv", ["uri,prompt", *(f"{n},x\n{n},y" for n in names)]))
    assert [Path(part).name for part in work.fresh] == [f"fresh-0000{n}.parquet" for n in range(3)]
    assert _names(work.fresh) == names
    assert Counter(len(row["prompts"]) for row in _rows(work.fresh)) == {2: 10}


@pytest.mark.parametrize("window_s", [0.0, 4.0])
def test_the_work_list_does_not_depend_on_how_much_lies_in_memory(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, window_s: float
) -> None:
    random = Random(7)
    prompt_id = keys.prompt_id(DEFAULT)
    states = Counter[str]()
    for number in range(60):
        name = f"{number}.mp4"
        corpus.add(name)
        own = corpus.key(name)
        uri = str(corpus.videos / name)
        parts = [own]
        if window_s:
            parts = [
                keys.window_key(own, window_s, n, last=n == random.randint(1, 4)) for n in range(3)
            ]
        for key in random.sample(parts, random.randint(0, len(parts))):
            state = random.choice(["answered", "failed", "cached", "changed since"])
            states[state] += 1
            about = {"uri": uri, "object_key": own, "window_s": window_s or None}
            if state == "cached":
                corpus.cached(key)
            elif state == "answered":
                corpus.answer(key, prompt_id, DEFAULT, **about)
            elif state == "failed":
                failure = {"status": "failed", "error_stage": "decode", "attempts": 1}
                failure["error_type"] = random.choice(["truncated", "decode_crash"])
                corpus.answer(key, prompt_id, DEFAULT, **about, **failure)
            else:
                corpus.answer(key, prompt_id, DEFAULT, **about)
                corpus.answer("f" * 64, prompt_id, DEFAULT, uri=uri)
    assert min(states.values()) > 3

    def work() -> tuple[WorkCounts, list[pa.Table]]:
        config = replace(
            CaptionConfig(source=str(corpus.videos), output=str(corpus.output)),
            media=replace(MediaConfig(), window_s=window_s),
        )
        done = AnswerIndex(STORAGE, str(corpus.output), fingerprint=FINGERPRINT)
        cached = CacheIndex(STORAGE, str(corpus.cache))
        known = known_videos(STORAGE, str(corpus.output), done.videos, cached, [])
        roll_call = RollCall(known, config.source)
        listed = list_work(
            config,
            STORAGE,
            done=done,
            cached=cached,
            folder=str(corpus.output / "run"),
            roll_call=roll_call,
        )
        assert roll_call.absent() == []
        files = [*listed.fresh, *listed.cached, *listed.failed]
        return listed.counts, [pq.read_table(file) for file in files]

    expected = work()
    counts = expected[0]
    assert min(counts.fresh, counts.cached + counts.windows, counts.prompts_answered) > 3
    monkeypatch.setattr(key_index, "IN_MEMORY", 5)
    monkeypatch.setattr(spilled_rows, "IN_MEMORY", 5)
    assert work() == expected
