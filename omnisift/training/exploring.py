"""Noise on a selector's scores: it meets what it would not choose, and learns of it.

Both are `explore` of a compression. Shapes: B videos, R chunks of a group, A audio tokens (padded).
"""

import torch
from torch import Tensor

from omnisift.compress import Explore


def exploring(noise: float) -> Explore | None:
    """Return scores with Gumbel noise of that size, their gradient without its mean; of 0, none.

    How many tokens a chunk keeps is fixed, so raising all scores alike changes nothing; but only
    kept tokens have a gradient, nearly all of them would like to be larger, and most tokens are
    silent: uncentred, the selector learns to keep what is frequent, loses the rare sounds, and
    without noise never meets them again.
    """

    def explore(score_RA: Tensor, valid_RA: Tensor) -> Tensor:
        mean = (score_RA * valid_RA).sum(1, keepdim=True) / valid_RA.sum(1, keepdim=True)
        gumbel = -torch.log(-torch.log(torch.rand_like(score_RA).clamp(1e-6, 1 - 1e-6)))
        return score_RA - (mean - mean.detach()) + noise * gumbel

    return explore if noise else None


class Antithetic:
    """Scores pushed by noise in one compression, and by the same turned round in the next.

    What a model says of both selections tells which scores should be larger, also those of tokens
    that were dropped: the gradient of the expected loss by differences along random directions
    (evolution strategies, arXiv 1703.03864, section 2.1).
    """

    def __init__(self, noise: float) -> None:
        """Explore for two compressions alike; `noise` is the standard deviation of the push."""
        self.noise = noise
        self.pushed: list[tuple[Tensor, Tensor]] = []  # scores and push [R, A] of each group
        self._turned = 0

    def first(self, score_RA: Tensor, valid_RA: Tensor) -> Tensor:
        """Return the pushed scores, without a gradient."""
        push_RA = self.noise * torch.randn_like(score_RA) * valid_RA
        self.pushed.append((score_RA, push_RA))
        return score_RA.detach() + push_RA

    def second(self, _score_RA: Tensor, _valid_RA: Tensor) -> Tensor:
        """Return the scores of the first compression, pushed the other way."""
        score_RA, push_RA = self.pushed[self._turned]
        self._turned += 1
        return score_RA.detach() - push_RA

    def loss(self, first_B: Tensor, second_B: Tensor) -> Tensor:
        """Return what has that gradient, from the losses of both selections of B videos.

        In each group the chunks of each video have to follow one another, as many in each.
        """
        if not self.pushed:
            raise RuntimeError("nothing was selected, so there is nothing to learn of it")
        along_B = torch.stack(
            [(score * push).reshape(len(first_B), -1).sum(1) for score, push in self.pushed]
        ).sum(0)
        return ((first_B - second_B).detach() / 2 * along_B / self.noise**2).mean()
