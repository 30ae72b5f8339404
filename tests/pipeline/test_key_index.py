import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import key_index
from pipeline.errors import StartupError
from pipeline.key_index import KEY, KeyIndex, Keys, entries, from_hex

# Few distinct bytes, zeros among them: numpy's strings treat zeros at the end as padding.
few = st.lists(st.sampled_from([0, 1, 255]), min_size=32, max_size=32).map(bytes)
any_keys = st.lists(few | st.binary(min_size=32, max_size=32), max_size=20)


def _array(found: Iterable[bytes]) -> Keys:
    return np.frombuffer(b"".join(found), KEY)


@given(any_keys, any_keys)
def test_keys_are_found_as_in_a_dict_that_was_filled_in_order(
    stored: list[bytes], asked: list[bytes]
) -> None:
    oracle = {key: place for place, key in enumerate(stored)}
    index = KeyIndex([entries(_array(stored), np.arange(len(stored)))])
    asked = asked + stored
    assert index.find(_array(asked)).tolist() == [oracle.get(key, -1) for key in asked]
    assert len(index) == len(oracle)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(few | st.binary(min_size=32, max_size=32), st.integers(-2, 2)), max_size=40),
    st.integers(1, 12),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_an_index_in_partitions_finds_what_a_dict_does(
    stored: list[tuple[bytes, int]], in_memory: int, in_a_piece: int, random: Random
) -> None:
    numbered = [(time, place, key) for place, (key, time) in enumerate(stored)]
    oracle = {key: place for _, place, key in sorted(numbered)}
    random.shuffle(numbered)
    pieces = [
        entries(
            _array(key for *_, key in piece),
            np.array([place for _, place, _ in piece], np.int64),
            np.array([time for time, *_ in piece], np.int64),
        )
        for piece in (
            numbered[start : start + in_a_piece] for start in range(0, len(stored), in_a_piece)
        )
    ]
    with mock.patch.object(key_index, "IN_MEMORY", in_memory):
        index = KeyIndex(pieces)
    asked = [*(key for key, _ in stored), *(bytes([n]) * 32 for n in range(256))]
    assert index.find(_array(asked)).tolist() == [oracle.get(key, -1) for key in asked]
    assert len(index) == len(oracle)
    found = [place for places in index.places() for place in places.tolist()]
    assert sorted(found) == sorted(oracle.values())


def test_random_keys_in_partitions_are_found_as_in_a_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(key_index, "IN_MEMORY", 10_000)
    keys = np.frombuffer(np.random.default_rng(5).bytes(32 * 150_000), KEY)
    stored = np.concatenate([keys[:100_000], keys[50_000:60_000]])  # these again, and later
    pieces = np.array_split(entries(stored, np.arange(len(stored))), 7)
    index = KeyIndex(pieces)
    oracle = {key: place for place, key in enumerate(stored.tolist())}
    assert index.find(keys).tolist() == [oracle.get(key, -1) for key in keys.tolist()]
    assert list(tmp_path.iterdir()) == []  # nothing to be left behind


def test_no_room_for_partitions_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_index, "IN_MEMORY", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(StartupError, match="TMPDIR"):
        KeyIndex([entries(_array([bytes(32)] * 2), np.arange(2))])


def test_hex_is_read_as_bytes() -> None:
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(5)]
    assert from_hex(digests).tobytes().hex() == "".join(digests)


@pytest.mark.parametrize("bad", ["ab", "g" * 64, " " * 64, "ab" * 31 + "  ", "ab" * 33])
def test_what_is_no_key_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="hex"):
        from_hex(["ab" * 32, bad])
