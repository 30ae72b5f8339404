"""The likeliest option against a sum over each option by itself."""

import math

from hypothesis import given
from hypothesis import strategies as st

from omnisift.engines.option_tree import likeliest, next_tokens

options = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
)


@given(options, st.integers(0, 1 << 30))
def test_equals_a_sum_for_each_option(given_options: list[tuple[int, ...]], seed: int) -> None:
    def logprob(beginning: tuple[int, ...], token: int) -> float:
        return math.log(1 + hash((seed, beginning, token)) % 997) - 7

    asked = next_tokens(given_options)
    found = {
        beginning: {token: logprob(beginning, token) for token in tokens}
        for beginning, tokens in asked.items()
    }
    sums = []
    for option in given_options:
        total = 0.0
        for length in range(len(option)):
            total += logprob(option[:length], option[length])
        sums.append(total)
    assert likeliest(given_options, found) == sums.index(max(sums))


@given(options)
def test_nothing_is_asked_twice_or_in_vain(given_options: list[tuple[int, ...]]) -> None:
    needed = {(option[:i], option[i]) for option in given_options for i in range(len(option))}
    asked = next_tokens(given_options)
    pairs = [(beginning, token) for beginning, tokens in asked.items() for token in tokens]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == needed
