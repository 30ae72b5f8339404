"""Codecs against their closed forms, element by element."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisift.codec import CODECS, Codec, decode, encode

SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=SHAPES, seed=st.integers(0, 99), magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
def test_exact_codecs_give_back_what_they_were_given(
    shape: tuple[int, int], seed: int, magnitude: float
) -> None:
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    assert torch.equal(decode(encode(tokens, "float32"), "float32", shape), tokens)
    half = tokens.bfloat16()
    assert torch.equal(decode(encode(half, "bfloat16"), "bfloat16", shape), half)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=SHAPES, seed=st.integers(0, 99), magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
def test_int8_is_off_by_half_a_scale_at_most(
    shape: tuple[int, int], seed: int, magnitude: float
) -> None:
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    data = encode(tokens, "int8")
    found = decode(data, "int8", shape)
    for row in range(shape[0]):
        largest = max(abs(value) for value in tokens[row].tolist())
        for value, back in zip(tokens[row].tolist(), found[row].tolist(), strict=True):
            assert abs(value - back) <= largest / 127 * 0.5001


def test_int8_bytes_are_as_documented() -> None:
    tokens = torch.tensor([[127.0, -63.5, 0.0], [0.0, 0.0, 0.0], [-2.54, 1.27, 2.54]])
    data = encode(tokens, "int8")
    assert struct.unpack("<9b", data[:9]) == (127, -64, 0, 0, 0, 0, -127, 64, 127)
    assert struct.unpack("<3f", data[9:]) == pytest.approx((1.0, 0.0, 0.02))
    assert torch.isfinite(decode(data, "int8", (3, 3))).all()


def test_int8_takes_half_the_room_of_bfloat16() -> None:
    tokens = torch.randn(100, 3584)
    assert len(encode(tokens, "int8")) / len(encode(tokens, "bfloat16")) < 0.501


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_another_number_are_refused(codec: Codec) -> None:
    data = encode(torch.randn(3, 4), codec)
    with pytest.raises(ValueError, match=rf"{codec} tokens \[3, 5\] take"):
        decode(data, codec, (3, 5))
