"""Score several options at once by the log-probabilities of single next tokens.

The log-probability of an option is the sum over its tokens of log P(token | prompt, tokens in
front). Options that begin alike share those terms, so each distinct beginning is asked once.
"""

from collections.abc import Mapping, Sequence

Ids = tuple[int, ...]


def next_tokens(options: Sequence[Ids]) -> dict[Ids, list[int]]:
    """Return for each beginning of the options, () included, the tokens that follow it in any."""
    following: dict[Ids, dict[int, None]] = {}
    for option in options:
        for length, token in enumerate(option):
            following.setdefault(option[:length], {})[token] = None
    return {beginning: list(tokens) for beginning, tokens in following.items()}


def likeliest(options: Sequence[Ids], logprobs: Mapping[Ids, Mapping[int, float]]) -> int:
    """Return the index of the option with the largest sum; of equal ones the first.

    `logprobs[beginning][token]` is log P(token | prompt, beginning).
    """
    sums = [
        sum(logprobs[option[:length]][token] for length, token in enumerate(option))
        for option in options
    ]
    return sums.index(max(sums))
