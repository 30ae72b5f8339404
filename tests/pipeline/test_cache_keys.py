"""Key files say what the part files say, and cost nothing but time when they are lost."""

import hashlib
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import cache_keys, keys, rows, token_cache
from pipeline.compact_cache import compact_cache
from pipeline.config import StorageConfig
from pipeline.storage import Storage
from pipeline.token_cache import CacheIndex, Location
from pipeline.verify import verify_cache

STORAGE = Storage(StorageConfig(attempts=1))
INGREDIENTS: dict[str, keys.Ingredient] = {"model": "m"}


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    found = f"{tmp_path}/{keys.fingerprint(INGREDIENTS)}"
    token_cache.write_fingerprint(STORAGE, found, INGREDIENTS)
    return found


def _write(folder: str, *names: str) -> str:
    kept = [
        {
            "video_key": _key(name),
            "uri": f"/videos/{name}",
            "tokens": name.encode() * 4,
            "token_dtype": "int8",
            "token_shape": [1, 4 * len(name)],
            "positions": [[0], [0], [0]],
            "modality": [0],
            "next_position": 1,
            "kept_index": [0],
        }
        for name in names
    ]
    return token_cache.write_part(
        STORAGE, folder, f"20260101T000000Z-{uuid.uuid4().hex[:8]}", rows.build(kept, rows.KEPT)
    )


def _compact(folder: str, target_bytes: int = 1) -> None:
    compact_cache(STORAGE, folder, target_bytes=target_bytes, grace_s=0, now=datetime.now(UTC))


def _locate(folder: str, names: str) -> list[Location | None]:
    return CacheIndex(STORAGE, folder).locate([_key(name) for name in names])


def test_a_key_file_says_what_the_part_files_say(folder: str) -> None:
    first, second = _write(folder, "a", "b", "c"), _write(folder, "d")
    from_parts = _locate(folder, "abcdx")
    assert from_parts == [*(Location(first, row) for row in range(3)), Location(second, 0), None]
    _compact(folder)
    (key_file,) = token_cache.list_folder(STORAGE, folder).key_files
    assert _locate(folder, "abcdx") == from_parts
    assert list(verify_cache(STORAGE, folder)) == []
    STORAGE.delete(key_file)
    assert _locate(folder, "abcdx") == from_parts


def test_part_files_that_a_key_file_speaks_for_are_not_opened(folder: str) -> None:
    uri = _write(folder, "a", "b")
    _compact(folder)
    length = STORAGE.stat(uri).size_bytes
    Path(uri).write_bytes(b"\0" * length)  # would be unreadable
    index = CacheIndex(STORAGE, folder)
    assert (len(index), index.unreadable) == (2, [])


def test_part_files_written_and_deleted_since_are_known(folder: str) -> None:
    gone = _write(folder, "a", "b")
    _compact(folder)
    STORAGE.delete(gone)
    new = _write(folder, "b", "c")
    assert _locate(folder, "abc") == [None, Location(new, 0), Location(new, 1)]
    _compact(folder)
    assert len(token_cache.list_folder(STORAGE, folder).key_files) == 1
    assert _locate(folder, "abc") == [None, Location(new, 0), Location(new, 1)]


def test_a_tombstone_counts_beside_a_key_file(folder: str) -> None:
    uri = _write(folder, "a", "b", "c")
    _compact(folder)
    buried = [(_key(name), Location(uri, row)) for row, name in enumerate("ab")]
    token_cache.bury_all(STORAGE, folder, buried, reason="damaged")
    assert _locate(folder, "abc") == [None, None, Location(uri, 2)]


def test_a_broken_key_file_is_passed_over_and_replaced(folder: str) -> None:
    uri = _write(folder, "a")
    _compact(folder)
    (key_file,) = token_cache.list_folder(STORAGE, folder).key_files
    Path(key_file).write_bytes(Path(key_file).read_bytes()[:-9])
    assert _locate(folder, "a") == [Location(uri, 0)]
    assert list(verify_cache(STORAGE, folder)) == [f"{key_file}: cannot be read"]
    _compact(folder)
    assert list(verify_cache(STORAGE, folder)) == []


def test_a_key_file_that_is_wrong_is_a_fault(folder: str) -> None:
    uri = _write(folder, "a")
    other = cache_keys.read_part(STORAGE, _write(folder, "b"))
    assert other is not None
    key_file = cache_keys.write_keys(STORAGE, folder, [(uri, other)])
    assert list(verify_cache(STORAGE, folder)) == [
        f"{key_file}: names other videos than {uri} holds"
    ]


def test_a_second_compaction_writes_no_other_key_file(folder: str) -> None:
    _write(folder, "a")
    _compact(folder)
    before = token_cache.list_folder(STORAGE, folder)
    _compact(folder)
    assert token_cache.list_folder(STORAGE, folder) == before
