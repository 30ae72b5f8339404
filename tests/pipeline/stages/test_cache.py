import hashlib
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keys, rows, token_cache
from pipeline.config import StorageConfig
from pipeline.errors import StartupError
from pipeline.parquet import UNREADABLE
from pipeline.stages.cache import ReadCache, WriteCache
from pipeline.storage import Storage, StorageError
from pipeline.token_cache import CacheIndex

STORAGE = Storage(StorageConfig())
RUN_ID = "20260101T000000Z-00000000"


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _identity(name: str) -> dict[str, Any]:
    return {
        "video_key": _key(name),
        "uri": f"s3://bucket/{name}",
        "size_bytes": 5,
        "etag": "e",
        "prompts": [{"prompt_id": "p", "prompt": "What?", "choices": ["a", "b"]}],
        "attempts": 1,
    }


def _kept(name: str, *, num_tokens: int = 3, width: int = 4, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        **_identity(name),
        "duration_s": 2.5,
        "fps": 2.0,
        "has_audio": True,
        "tokens": rng.bytes(num_tokens * width * 2),
        "token_dtype": "bfloat16",
        "token_shape": [num_tokens, width],
        "positions": rng.integers(0, 99, (3, num_tokens)).tolist(),
        "modality": rng.integers(0, 2, num_tokens).tolist(),
        "next_position": 100,
        "kept_index": list(range(num_tokens)),
        "num_video_tokens": 8,
        "num_audio_tokens": 4,
        "kept_video_tokens": 2,
        "kept_audio_tokens": 1,
        "decode_s": 0.5,
        "compress_s": 0.25,
    }


def _failed(name: str) -> dict[str, Any]:
    return rows.failed(_identity(name), "decode", "truncated", "cut")


def _write(folder: Path, videos: Sequence[dict[str, Any]]) -> pa.Table:
    return WriteCache(STORAGE, str(folder), RUN_ID)(rows.build(videos, rows.KEPT))


def _read(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    places = CacheIndex(STORAGE, str(folder)).locate([_key(name) for name in names])
    hits = [
        {**_identity(name), "cache_file": place.file, "cache_row": place.row}
        for name, place in zip(names, places, strict=True)
        if place
    ]
    return _call(hits)


def _call(hits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    block = ReadCache(STORAGE)(rows.build(hits, token_cache.HITS))
    assert block.schema == rows.KEPT
    found: list[dict[str, Any]] = block.to_pylist()
    return found


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _damage(part: Path, row: int) -> None:
    """Change one token of a row and write the rest as it was, with its old sha256."""
    table = pq.read_table(part)
    found = table.to_pylist()
    found[row]["tokens"] = bytes([found[row]["tokens"][0] ^ 1]) + found[row]["tokens"][1:]
    pq.write_table(pa.Table.from_pylist(found, table.schema), part, row_group_size=1)


blocks = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.integers(0, 6),
        st.integers(0, 1 << 30),
        st.sampled_from([True, False]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(blocks)
def test_tokens_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    videos = [
        _kept(f"v{n}", num_tokens=tokens, width=width, seed=seed) if ok else _failed(f"v{n}")
        for n, (tokens, width, seed, ok) in enumerate(shapes)
    ]
    _write(folder, videos)
    good = [video for video in videos if "tokens" in video]
    found = _read(folder, [f"v{n}" for n in range(len(videos))])
    assert len(found) == len(good)
    for video, back in zip(good, found, strict=True):
        assert back["cache_hit"] is True
        assert back["cache_s"] > 0
        measured = {"decode_s", "compress_s"}  # of the run that computed the tokens, not of this
        assert {name: back[name] for name in video if name not in measured} == {
            name: value for name, value in video.items() if name not in measured
        }
        assert back["decode_s"] is back["compress_s"] is None


def test_the_sha256_is_over_the_bytes_the_docstring_says() -> None:
    video = _kept("v", num_tokens=2, width=1)
    head = ["bfloat16", [2, 1], 100, [2, 2, 2, 2, 2]]
    oracle = hashlib.sha256(json.dumps(head).encode() + video["tokens"])
    oracle.update(bytes(video["modality"]) + struct.pack("<2i", *video["kept_index"]))
    oracle.update(b"".join(struct.pack("<2i", *axis) for axis in video["positions"]))
    assert token_cache.digest(video) == oracle.hexdigest()


@pytest.mark.parametrize(
    "name", ["tokens", "token_shape", "positions", "modality", "next_position", "kept_index"]
)
def test_the_sha256_covers(name: str) -> None:
    video = _kept("v", num_tokens=2, width=1)
    other = {
        "tokens": video["tokens"][::-1],
        "token_shape": [1, 2],
        "positions": video["positions"][::-1],
        "modality": [1 - value for value in video["modality"]],
        "next_position": 101,
        "kept_index": [1, 0],
    }
    assert token_cache.digest({**video, name: other[name]}) != token_cache.digest(video)


def test_written_rows_move_on_with_their_seconds_and_failed_ones_untouched(tmp_path: Path) -> None:
    videos = [_kept("a"), _failed("b"), _kept("c")]
    block = _write(tmp_path, videos)
    assert block.schema == rows.KEPT
    before = rows.build(videos, rows.KEPT).to_pylist()
    for row, back in zip(before, block.to_pylist(), strict=True):
        ok = row["error_type"] is None
        assert (back["cache_s"] is not None) == ok
        assert back["cache_hit"] is (False if ok else None)
        assert back == {**row, "cache_s": back["cache_s"], "cache_hit": back["cache_hit"]}


def test_one_block_is_one_file_with_a_row_group_a_video(tmp_path: Path) -> None:
    _write(tmp_path, [_kept("a"), _failed("b"), _kept("c")])
    (part,) = _parts(tmp_path)
    assert part.name.startswith(f"part-{RUN_ID}-")
    assert [path.name for path in tmp_path.iterdir()] == [part.name]  # nothing unfinished
    metadata = pq.read_metadata(part)
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [1, 1]
    assert pq.read_schema(part).equals(rows.CACHED)
    assert b"ARROW:extension" not in (part.read_bytes())


@pytest.mark.parametrize("videos", [[], [_failed("a"), _failed("b")]])
def test_nothing_is_written_for_a_block_without_tokens(
    tmp_path: Path, videos: list[dict[str, Any]]
) -> None:
    assert _write(tmp_path, videos).num_rows == len(videos)
    assert list(tmp_path.iterdir()) == []


def test_the_latest_of_equal_keys_counts(tmp_path: Path) -> None:
    for seed in range(6):
        _write(tmp_path, [_kept("other", seed=9), _kept("v", seed=seed)])
    (found,) = _read(tmp_path, ["v"])
    assert found["tokens"] == _kept("v", seed=5)["tokens"]
    assert len(CacheIndex(STORAGE, str(tmp_path))) == 2


def test_an_unreadable_file_is_reported_and_its_videos_are_misses(tmp_path: Path) -> None:
    _write(tmp_path, [_kept("a")])
    _write(tmp_path, [_kept("b")])
    broken = next(path for path in _parts(tmp_path) if _key("a") in str(pq.read_table(path)))
    broken.write_bytes(broken.read_bytes()[:-20])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "part-foreign.parquet")
    index = CacheIndex(STORAGE, str(tmp_path))
    assert index.unreadable == sorted([str(broken), str(tmp_path / "part-foreign.parquet")])
    places = index.locate([_key("a"), _key("b")])
    assert [place is None for place in places] == [True, False]


def test_a_cache_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    index = CacheIndex(STORAGE, str(tmp_path / "none"))
    assert len(index) == 0
    assert index.locate([_key("a")]) == [None]
    assert index.locate([]) == []


def test_a_damaged_row_fails_alone_and_is_a_miss_in_the_next_run(tmp_path: Path) -> None:
    _write(tmp_path, [_kept("a"), _kept("b")])
    (part,) = _parts(tmp_path)
    _damage(part, 1)
    good, bad = _read(tmp_path, ["a", "b"])
    assert good["error_type"] is None
    assert (bad["error_stage"], bad["error_type"]) == ("cache", "cache_corrupt")
    assert "s3://bucket/b" in bad["error_message"]
    assert bad["tokens"] is None
    places = CacheIndex(STORAGE, str(tmp_path)).locate([_key("a"), _key("b")])
    assert [place is None for place in places] == [False, True]
    _write(tmp_path, [_kept("b", seed=7)])  # computed again
    (again,) = _read(tmp_path, ["b"])
    assert again["tokens"] == _kept("b", seed=7)["tokens"]


def test_a_damaged_row_gives_way_to_an_older_good_one(tmp_path: Path) -> None:
    _write(tmp_path, [_kept("a", seed=1)])
    (old,) = _parts(tmp_path)
    _write(tmp_path, [_kept("a", seed=2)])
    _damage(next(path for path in _parts(tmp_path) if path != old), 0)
    assert _read(tmp_path, ["a"])[0]["error_type"] == "cache_corrupt"
    assert _read(tmp_path, ["a"])[0]["tokens"] == _kept("a", seed=1)["tokens"]


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_no_flipped_byte_of_a_file_ever_gives_other_tokens(
    tmp_path_factory: pytest.TempPathFactory, place: float, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    _write(folder, [_kept("a", num_tokens=40)])
    (part,) = _parts(folder)
    data = bytearray(part.read_bytes())
    data[int(place * len(data))] ^= flip
    part.write_bytes(data)
    (back,) = _call([{**_identity("a"), "cache_file": str(part), "cache_row": 0}])
    if back["error_type"] is None:
        names = ["tokens", "token_shape", "positions", "modality", "kept_index", "next_position"]
        assert [back[name] for name in names] == [_kept("a", num_tokens=40)[name] for name in names]
    else:
        assert back["error_type"] == "cache_corrupt"


def test_a_file_that_is_gone_fails_its_row_and_leaves_no_tombstone(tmp_path: Path) -> None:
    hit = {**_identity("a"), "cache_file": str(tmp_path / "part-x.parquet"), "cache_row": 0}
    (row,) = _call([hit])
    assert (row["error_stage"], row["error_type"]) == ("cache", "not_found")
    assert list(tmp_path.iterdir()) == []


class _BreaksOff(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        if self.tell() == 4:  # where the first column starts: the footer is read without fault
            raise StorageError("storage_error", "no complete answer")
        return super().read(size)


def test_a_store_that_breaks_off_fails_the_row_and_leaves_no_tombstone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, [_kept("a")])
    (part,) = _parts(tmp_path)
    monkeypatch.setattr(Storage, "open", lambda _, uri: _BreaksOff(Path(uri).read_bytes()))
    (row,) = _call([{**_identity("a"), "cache_file": str(part), "cache_row": 0}])
    assert (row["error_type"], row["error_message"]) == ("storage_error", "no complete answer")
    assert list(tmp_path.iterdir()) == [part]


def test_shortage_of_memory_stops_the_reader_and_buries_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, [_kept("a")])

    def short(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", short)
    with pytest.raises(MemoryError):
        _read(tmp_path, ["a"])
    assert not list(tmp_path.glob("bad-*"))


def test_all_that_arrow_raises_is_damage_but_shortage_and_interruption() -> None:
    kinds = {kind for kind in vars(pa).values() if isinstance(kind, type)}
    raised = {kind for kind in kinds if issubclass(kind, pa.ArrowException)}
    damage = {kind for kind in raised if issubclass(kind, UNREADABLE)}
    assert raised - damage == {pa.ArrowException, pa.ArrowMemoryError, pa.ArrowCancelled}


def test_the_tokens_of_another_video_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, [_kept("a")])
    (part,) = _parts(tmp_path)
    (row,) = _call([{**_identity("b"), "cache_file": str(part), "cache_row": 0}])
    assert row["error_type"] == "cache_corrupt"


def test_failed_rows_pass_the_reader_untouched() -> None:
    (row,) = _call([_failed("a")])
    assert {name: row[name] for name in _failed("a")} == _failed("a")
    assert row["cache_hit"] is None
    assert _call([]) == []


def test_a_broken_tombstone_hides_nothing(tmp_path: Path) -> None:
    _write(tmp_path, [_kept("a")])
    (tmp_path / "bad-1.json").write_text("{")
    (tmp_path / "bad-2.json").write_text("[]")
    assert len(_read(tmp_path, ["a"])) == 1


def test_ingredients_are_written_once_and_readable(tmp_path: Path) -> None:
    ingredients: dict[str, keys.Ingredient] = {"model": "m", "retain": 0.25}
    folder = tmp_path / keys.fingerprint(ingredients)
    token_cache.write_fingerprint(STORAGE, str(folder), ingredients)
    written = (folder / "fingerprint.json").stat().st_mtime_ns
    token_cache.write_fingerprint(STORAGE, str(folder), ingredients)
    assert (folder / "fingerprint.json").stat().st_mtime_ns == written
    assert json.loads((folder / "fingerprint.json").read_text()) == ingredients


def test_a_cache_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / keys.fingerprint({})
    with pytest.raises(StartupError, match=r"cache\.path"):
        token_cache.write_fingerprint(STORAGE, str(folder), {})
