"""Compaction, killed between any two of its writes and deletes, while readers go on."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import compact
from pipeline import cache_keys, keys, rows, token_cache
from pipeline.answer_index import AnswerIndex
from pipeline.answers import COMMITTED, commit, find_files, read_answers
from pipeline.compact_answers import compact_answers
from pipeline.compact_cache import Compaction, compact_cache
from pipeline.config import StorageConfig
from pipeline.errors import StartupError
from pipeline.parquet import UNREADABLE, open_parquet, read_columns
from pipeline.storage import Storage
from pipeline.token_cache import CacheIndex
from pipeline.verify import verify_cache, verify_output

STORAGE = Storage(StorageConfig())
START = datetime(2026, 1, 1, tzinfo=UTC)
INGREDIENTS: dict[str, keys.Ingredient] = {"model": "m"}


class _KilledError(Exception):
    pass


class _Watched:
    """A storage that ends the process before its n-th change, and is looked at after each."""

    def __init__(self, look: Callable[[], None], changes: int | None = None) -> None:
        self._look = look
        self._left = changes
        self.done = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(STORAGE, name)
        return self._changing(method) if name in ("write", "delete") else method

    def _changing(self, method: Callable[..., None]) -> Callable[..., None]:
        def change(*arguments: Any) -> None:
            if self._left is not None and self.done == self._left:
                raise _KilledError
            self.done += 1
            method(*arguments)
            self._look()

        return change


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


# --- the cache


def _cached(name: str, version: int, *, num_tokens: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(version)
    row = {
        "video_key": _key(name),
        "uri": f"s3://bucket/{name}",
        "tokens": rng.bytes(num_tokens * 4),
        "token_dtype": "float32",
        "token_shape": [num_tokens, 1],
        "positions": [list(range(num_tokens))] * 3,
        "modality": [1] * num_tokens,
        "next_position": 9,
        "kept_index": list(range(num_tokens)),
        "run_id": "run",
        "created_at": START + timedelta(seconds=version),
    }
    return {**row, "sha256": token_cache.digest(row)}


def _part(folder: Path, number: int, videos: Sequence[dict[str, Any]]) -> Path:
    path = folder / f"part-20260101T00000{number}Z-{number:08x}-{number:032x}.parquet"
    token_cache.write_rows(STORAGE, str(path), [rows.build(videos, rows.CACHED)])
    return path


def _cache(root: Path) -> Path:
    """Return a folder with rows of every kind: superseded, damaged, buried, alone."""
    folder = root / keys.fingerprint(INGREDIENTS)
    token_cache.write_fingerprint(STORAGE, str(folder), INGREDIENTS)
    _part(folder, 0, [_cached("a", 0), _cached("b", 0)])
    _part(folder, 1, [_cached("b", 1), _cached("c", 1)])  # b is superseded in part 0
    _part(folder, 2, [_cached("c", 2)])
    damaged = _part(folder, 3, [_cached("d", 3), {**_cached("a", 3), "tokens": b"x" * 12}])
    token_cache.bury(STORAGE, str(damaged), 1, video_key=_key("a"), reason="damaged")
    _part(folder, 4, [{**_cached("b", 4), "tokens": b"y" * 12}])  # nobody has read it yet
    return folder


def _tokens(folder: Path, names: str = "abcd") -> dict[str, bytes | None]:
    """Read as the stage does: a damaged row is buried and an older copy counts."""
    while True:
        index = CacheIndex(STORAGE, str(folder))
        found: dict[str, bytes | None] = {}
        for name, place in zip(names, index.locate([_key(name) for name in names]), strict=True):
            found[name] = None
            if place is None:
                continue
            with open_parquet(STORAGE, place.file) as part:
                try:
                    [row] = token_cache.read_row(part, place.row).to_pylist()
                    found[name] = row["tokens"]
                except UNREADABLE as error:
                    token_cache.bury(
                        STORAGE, place.file, place.row, video_key="", reason=str(error)
                    )
                    break
        else:
            return found


EXPECTED = {
    name: _cached(name, version)["tokens"]
    for name, version in zip("abcd", (0, 1, 2, 3), strict=True)
}


def _compact_cache(storage: Any, folder: Path, **changes: Any) -> Compaction:
    options = {"target_bytes": 1 << 30, "grace_s": 0.0, "now": datetime.now(UTC), **changes}
    return compact_cache(cast("Storage", storage), str(folder), **options)


def _until_done(folder: Path) -> None:
    for _ in range(10):
        if (
            _compact_cache(STORAGE, folder, now=datetime.now(UTC) + timedelta(days=1))
            == Compaction()
        ):
            return
    pytest.fail("compaction finds always more to do")


@pytest.mark.parametrize("broken", range(5))
def test_a_part_file_that_cannot_be_opened_costs_its_own_rows(tmp_path: Path, broken: int) -> None:
    """Its keys stand in a key file, so that the index offers them. One part is all superseded."""
    parts = [[("a", 0), ("b", 0)], [("b", 1)], [("c", 2)], [("c", 3)], [("d", 4)]]
    folder = tmp_path / keys.fingerprint(INGREDIENTS)
    token_cache.write_fingerprint(STORAGE, str(folder), INGREDIENTS)
    files = [
        _part(folder, number, [_cached(name, version) for name, version in part])
        for number, part in enumerate(parts)
    ]
    cache_keys.renew_keys(STORAGE, str(folder), [str(file) for file in files], [])
    left = dict(video for n, part in enumerate(parts) if n != broken for video in part)
    expected = {
        name: _cached(name, left[name])["tokens"] if name in left else None for name in "abcd"
    }
    files[broken].write_bytes(files[broken].read_bytes()[:-20])
    superseded = broken == 2
    done = _compact_cache(STORAGE, folder)
    assert {message.partition(".parquet")[0] for message in done.damaged} == (
        set() if superseded else {str(files[broken].with_suffix(""))}
    )
    assert _tokens(folder) == expected
    _until_done(folder)
    assert _tokens(folder) == expected
    assert not files[broken].exists()
    assert not list(folder.glob("bad-*"))
    assert list(verify_cache(STORAGE, str(folder))) == []


@pytest.mark.parametrize("target_bytes", [1 << 30, 9000])
def test_a_cache_is_whole_after_every_step_and_every_kill(
    tmp_path: Path, target_bytes: int
) -> None:
    original = _cache(tmp_path / "original")
    assert _tokens(Path(shutil.copytree(original, tmp_path / "read" / original.name))) == EXPECTED
    for changes in range(100):
        folder = Path(shutil.copytree(original, tmp_path / str(changes) / original.name))
        looks = 0

        def look(folder: Path = folder) -> None:
            nonlocal looks
            copy = tmp_path / f"look-{folder.parent.name}-{looks}" / folder.name
            looks += 1
            assert _tokens(Path(shutil.copytree(folder, copy))) == EXPECTED

        storage = _Watched(look, changes)
        killed = False
        try:
            for _ in range(4):
                _compact_cache(storage, folder, target_bytes=target_bytes)
        except _KilledError:
            killed = True
        _until_done(folder)
        assert _tokens(folder) == EXPECTED
        assert list(verify_cache(STORAGE, str(folder))) == []
        names = sorted(path.name for path in folder.iterdir())
        assert [name for name in names if name.startswith("bad-")] == []
        if target_bytes == 1 << 30:
            assert len(names) == 3  # fingerprint.json, the merged file and its keys
            assert len(pq.read_table(folder / names[2])) == len(EXPECTED)
        if not killed:
            assert changes > 5
            return
    pytest.fail("never came to its end")


def test_what_a_run_may_be_reading_stays_for_the_grace_period(tmp_path: Path) -> None:
    folder = _cache(tmp_path)
    index = CacheIndex(STORAGE, str(folder))
    places = [place for place in index.locate([_key(name) for name in "abcd"]) if place]
    first = _compact_cache(STORAGE, folder, grace_s=3600.0)
    assert (first.merged, first.written, first.deleted) == (4, 1, 0)
    assert len(first.damaged) == 1
    again = _compact_cache(STORAGE, folder, grace_s=3600.0)
    assert (again.merged, again.deleted, again.waiting) == (0, 0, 5)
    assert all(Path(place.file).exists() for place in places)
    later = _compact_cache(
        STORAGE, folder, now=datetime.now(UTC) + timedelta(hours=2), grace_s=3600
    )
    assert later.deleted == 5
    assert _tokens(folder) == EXPECTED


def test_a_merged_file_that_is_damaged_before_the_old_ones_go_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / keys.fingerprint(INGREDIENTS)
    _part(folder, 0, [_cached("a", 0)])
    _part(folder, 1, [_cached("b", 1)])
    _compact_cache(STORAGE, folder, grace_s=3600.0)
    (merged,) = folder.glob("part-merged-*")
    good, bad = pq.read_table(merged).to_pylist()
    damaged = [good, {**bad, "tokens": b"x" * len(bad["tokens"])}]
    token_cache.write_rows(STORAGE, str(merged), [rows.build(damaged, rows.CACHED)])
    later = datetime.now(UTC) + timedelta(days=1)
    done = _compact_cache(STORAGE, folder, now=later)
    assert len(done.damaged) == 1
    assert _tokens(folder, "ab") == {
        name: _cached(name, n)["tokens"] for n, name in enumerate("ab")
    }


def test_a_file_of_good_size_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / keys.fingerprint(INGREDIENTS)
    large = [_part(folder, n, [_cached("abc"[n], n, num_tokens=5000)]) for n in range(2)]
    _part(folder, 2, [_cached("c", 2)])
    done = _compact_cache(STORAGE, folder, target_bytes=40_000)
    assert done == Compaction()
    assert all(path.exists() for path in large)


# --- the answers


def _answer(key: str, prompt_id: str, at: int, **columns: Any) -> dict[str, Any]:
    return {
        "video_key": _key(key),
        "uri": f"s3://b/{key[0]}",  # keys a1 and a2 are two states of one object
        "prompt_id": prompt_id,
        "prompt": f"{prompt_id}?",
        "text": f"{key} {prompt_id} {at}",
        "status": "ok",
        "attempts": 1,
        "fingerprint": "f",
        "run_id": "run",
        "created_at": START + timedelta(seconds=at),
        **columns,
    }


def _failure(key: str, prompt_id: str, at: int, **columns: Any) -> dict[str, Any]:
    failure = {"status": "failed", "error_stage": "decode", "error_type": "decode_crash"}
    return _answer(key, prompt_id, at, **{**failure, **columns})


def _run(output: Path, run_id: str, answers: Sequence[dict[str, Any]]) -> None:
    """Write what a run writes, a file of each kind for each answer, and commit it."""
    for number, answer in enumerate(answers):
        (output / run_id).mkdir(parents=True, exist_ok=True)
        row = {**answer, "run_id": run_id, "num_prompts": 1}
        for kind, schema in (("answers", rows.ANSWERS), ("videos", rows.VIDEOS)):
            table = rows.build([row], schema)
            pq.write_table(table, output / run_id / f"{kind}-{number}.parquet")
    commit(STORAGE, str(output), run_id)


def _output(root: Path) -> Path:
    output = root / "output"
    _run(output, "20260101T000000Z-0", [_answer("a1", "p", 0), _failure("b1", "p", 0)])
    _run(output, "20260102T000000Z-0", [_answer("a2", "p", 1), _answer("b1", "p", 1)])
    _run(output, "20260103T000000Z-0", [_failure("c1", "p", n, attempts=n) for n in (2, 3)])
    _run(output, "20260104T000000Z-0", [])
    return output


def _seen(output: Path) -> list[tuple[str, str, str]]:
    found = read_answers(str(output), STORAGE).to_pylist()
    return sorted((row["uri"], row["prompt_id"], row["text"]) for row in found)


def _compact_answers(storage: Any, output: Path, **changes: Any) -> Compaction:
    options = {"target_bytes": 1 << 30, "grace_s": 0.0, "now": datetime.now(UTC), **changes}
    return compact_answers(cast("Storage", storage), str(output), **options)


def test_answers_are_seen_once_after_every_step_and_every_kill(tmp_path: Path) -> None:
    original = _output(tmp_path / "original")
    expected = _seen(original)
    assert len(expected) == 3
    for changes in range(100):
        output = Path(shutil.copytree(original, tmp_path / str(changes)))

        def look(output: Path = output) -> None:
            assert _seen(output) == expected

        storage = _Watched(look, changes)
        killed = False
        try:
            for _ in range(3):
                _compact_answers(storage, output)
        except _KilledError:
            killed = True
        look()
        index = AnswerIndex(STORAGE, str(output), fingerprint="f")
        assert index.answered([(_key("a2"), "p", "p?"), (_key("c1"), "p", "p?")]).tolist() == [1, 0]
        assert index.attempts(_key("c1")) == 3
        # the next run may adopt what a killed compaction left
        commit(STORAGE, str(output), "20990101T000000Z-0", index.orphans)
        look()
        for _ in range(3):
            _compact_answers(STORAGE, output)
            look()
        assert list(verify_output(STORAGE, str(output))) == []
        left = find_files(str(output), STORAGE)
        assert (len(left.committed), left.orphans) == (2, ())
        assert len(list(output.rglob("*.parquet"))) == 2
        assert len(list(output.rglob(COMMITTED))) == 1
        assert _compact_answers(STORAGE, output) == Compaction()
        if not killed:
            assert changes > 10
            return
    pytest.fail("never came to its end")


def test_markers_of_nights_without_work_go_when_their_grace_period_ends(tmp_path: Path) -> None:
    output = _output(tmp_path)
    for night in range(5, 9):
        _run(output, f"2026010{night}T000000Z-0", [])
    expected = _seen(output)
    for _ in range(2):
        _compact_answers(STORAGE, output, grace_s=3600.0)
    markers = {path.parent.name for path in output.rglob(COMMITTED)}
    assert {f"2026010{night}T000000Z-0" for night in range(1, 9)} < markers
    later = datetime.now(UTC) + timedelta(hours=2)
    _compact_answers(STORAGE, output, grace_s=3600.0, now=later)
    (marker,) = output.rglob(COMMITTED)
    assert marker.parent.name in markers
    assert _seen(output) == expected
    assert list(verify_output(STORAGE, str(output))) == []


def test_nothing_is_left_of_an_output_that_was_given_up(tmp_path: Path) -> None:
    output = _output(tmp_path)
    for file in output.rglob("*.parquet"):
        file.write_bytes(b"lost")
    _compact_answers(STORAGE, output, drop_unreadable=True)
    _compact_answers(STORAGE, output)
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_replaced_answers_stay_for_the_grace_period(tmp_path: Path) -> None:
    output = _output(tmp_path)
    before = find_files(str(output), STORAGE).committed
    done = _compact_answers(STORAGE, output, grace_s=3600.0)
    assert (done.merged, done.written, done.deleted) == (12, 2, 0)
    assert _compact_answers(STORAGE, output, grace_s=3600.0) == Compaction(waiting=12)
    assert all(read_columns(STORAGE, uri).num_rows for uri in before)  # a slow reader's files
    assert not set(before) & {*find_files(str(output), STORAGE).orphans}
    later = datetime.now(UTC) + timedelta(hours=2)
    assert _compact_answers(STORAGE, output, grace_s=3600.0, now=later).deleted == 12


some_answers = st.lists(
    st.tuples(
        st.sampled_from(["a1", "a2", "b1", "b2"]),
        st.sampled_from("pq"),
        st.sampled_from([None, "decode", "source", "answer"]),
        st.sampled_from("fg"),
        st.integers(1, 4),
        st.integers(0, 3),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(some_answers, st.integers(1, 7))
def test_nothing_that_readers_or_runs_go_by_is_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[str, str, str | None, str, int, int]],
    cut: int,
) -> None:
    output = tmp_path_factory.mktemp("output")
    answers = [
        _answer(
            key,
            prompt,
            at,
            text=str(n),
            fingerprint=fingerprint,
            attempts=attempts,
            **(
                {"status": "failed", "error_stage": stage, "error_type": "decode_crash"}
                if stage
                else {}
            ),
        )
        for n, (key, prompt, stage, fingerprint, attempts, at) in enumerate(drawn)
    ]
    _run(output, "20260101T000000Z-0", answers[:cut])
    _run(output, "20260102T000000Z-0", answers[cut:])
    asks = [(_key(k), p, f"{p}?") for k in ("a1", "a2", "b1", "b2") for p in "pq"]

    def known() -> list[Any]:
        found: list[Any] = [_seen(output)]
        for fingerprint in "fg":
            index = AnswerIndex(STORAGE, str(output), fingerprint=fingerprint)
            answered = index.answered(asks).tolist()
            found += answered
            found += [
                ok or index.ask_given_up(*ask) for ok, ask in zip(answered, asks, strict=True)
            ]
        return found

    before = known()
    for _ in range(2):
        _compact_answers(STORAGE, output)
        assert known() == before


def test_nothing_is_dropped_while_a_file_cannot_be_read(tmp_path: Path) -> None:
    output = _output(tmp_path)
    broken = Path(find_files(str(output), STORAGE).committed[0])
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(StartupError, match=r"answers-0\.parquet cannot be read"):
        _compact_answers(STORAGE, output)


@pytest.mark.parametrize("gone", [False, True])
def test_files_that_cannot_be_read_are_given_up_when_that_is_asked_for(
    tmp_path: Path, gone: bool
) -> None:
    output = _output(tmp_path)
    broken = output / "20260102T000000Z-0" / "answers-0.parquet"  # of a2
    if gone:
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-9])
    done = _compact_answers(STORAGE, output, drop_unreadable=True)
    assert [message.partition(":")[0] for message in done.damaged] == [str(broken)]
    assert [uri for uri, _, _ in _seen(output)] == ["s3://b/a", "s3://b/b", "s3://b/c"]
    index = AnswerIndex(STORAGE, str(output), fingerprint="f")
    assert not index.answered([(_key("a2"), "p", "p?")])[0]
    _compact_answers(STORAGE, output)
    assert not broken.exists()
    assert list(verify_output(STORAGE, str(output))) == []


def test_no_answers_are_given_up_for_shortage_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = _output(tmp_path)
    expected = _seen(output)

    def short(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read", short)
        with pytest.raises(MemoryError):
            _compact_answers(STORAGE, output, drop_unreadable=True)
        with pytest.raises(MemoryError):
            AnswerIndex(STORAGE, str(output), fingerprint="f")
    assert _seen(output) == expected


def test_the_job_compacts_both_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = _output(tmp_path)
    _cache(output / "cache")
    monkeypatch.setattr("sys.argv", ["compact.py", f"output={output}"])
    assert compact.main() == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("answers: 12 files merged into 2; 0 replaced files deleted")
    assert "4 files merged into 1" in shown[1]
    assert shown[2].startswith("damaged: ")
    assert compact.main() == 0
