"""Key files say what the part files say, and cost nothing but time when they are lost."""

import hashlib
import uuid
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from pipeline import cache_keys, key_index, keys, rows, token_cache
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


def _random_cache(folder: str, seed: int) -> dict[str, list[Location]]:
    """Write part files with names that come again; return the places of each, the latest last."""
    random = Random(seed)
    places: dict[str, list[Location]] = {}
    for _ in range(random.randint(1, 12)):
        names = random.sample(range(40), random.randint(1, 6))
        uri = _write(folder, *(str(name) for name in names))
        for row, name in enumerate(names):
            places.setdefault(str(name), []).append(Location(uri, row))
    return places


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("in_memory", [1 << 22, 1, 9])
def test_any_mix_of_files_says_what_a_dict_says(
    folder: str, monkeypatch: pytest.MonkeyPatch, seed: int, in_memory: int
) -> None:
    """Key files whole, broken and lost; newer part files; tombstones; one partition or many."""
    random = Random(seed)
    monkeypatch.setattr(key_index, "IN_MEMORY", in_memory)
    monkeypatch.setattr(cache_keys, "KEYS_A_FILE", 7)
    expected = _random_cache(folder, seed)
    files = token_cache.list_folder(STORAGE, folder).files
    cache_keys.renew_keys(STORAGE, folder, files, ())
    key_files = token_cache.list_folder(STORAGE, folder).key_files
    for key_file in key_files:
        if random.random() < 0.3:
            STORAGE.delete(key_file)
        elif random.random() < 0.3:
            Path(key_file).write_bytes(Path(key_file).read_bytes()[:-9])
    for name, places in _random_cache(folder, seed + 100).items():
        expected.setdefault(name, []).extend(places)
    for name in random.sample(sorted(expected), 2):
        place = expected[name].pop()  # an older row counts again, where there is one
        token_cache.bury(STORAGE, place.file, place.row, video_key=_key(name), reason="damaged")

    def check() -> None:
        names = [str(name) for name in range(45)]
        index = CacheIndex(STORAGE, folder)
        found = dict(zip(names, index.locate([_key(name) for name in names]), strict=True))
        last = {name: places[-1] for name, places in expected.items() if places}
        assert found == {name: last.get(name) for name in names}
        assert len(index) == len(last)
        live = {
            Location(uri, row) for uri, _, rows_ in index.rows_of_files() for row in rows_.tolist()
        }
        assert live == set(last.values())

    check()
    for _ in range(2):
        found = token_cache.list_folder(STORAGE, folder)
        cache_keys.renew_keys(STORAGE, folder, found.files, found.key_files)
        check()
    assert list(verify_cache(STORAGE, folder)) == []


def test_full_key_files_stay_and_small_ones_are_merged(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_keys, "KEYS_A_FILE", 4)

    def renew() -> tuple[str, ...]:
        found = token_cache.list_folder(STORAGE, folder)
        cache_keys.renew_keys(STORAGE, folder, found.files, found.key_files)
        return token_cache.list_folder(STORAGE, folder).key_files

    _write(folder, "a", "b", "c")
    (full,) = renew()
    _write(folder, "d")
    both = renew()
    assert len(both) == 2
    assert full in both
    _write(folder, "e")
    after = renew()
    assert len(after) == 2
    assert full in after
    assert after != both
    assert renew() == after
    gone = token_cache.list_folder(STORAGE, folder).files[0]
    STORAGE.delete(gone)
    named = [cache_keys.read_key_file(STORAGE, folder, uri) or {} for uri in renew()]
    assert gone not in {file for files in named for file in files}


def test_a_key_file_deleted_behind_the_listing_costs_time_only(folder: str) -> None:
    uri = _write(folder, "a", "b")
    gone = f"{folder}/keys-{uuid.uuid4().hex}.parquet"
    [(file, found)] = cache_keys.read_keys(STORAGE, folder, [uri], [gone])
    assert (file, found is not None and len(found[0])) == (uri, 2)
