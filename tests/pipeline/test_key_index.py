import hashlib
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_hex_is_read_as_bytes() -> None:
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(5)]
    assert from_hex(digests).tobytes().hex() == "".join(digests)


@pytest.mark.parametrize("bad", ["ab", "g" * 64, " " * 64, "ab" * 31 + "  ", "ab" * 33])
def test_what_is_no_key_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="hex"):
        from_hex(["ab" * 32, bad])
