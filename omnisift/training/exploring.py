"""Let a selector meet what it does not choose: its scores in training, beside those at inference.

Shapes: C chunks, V video tokens, A audio tokens, D width.
"""

import torch
from torch import Tensor, nn

from omnisift.audio_selection import AudioSelector


class Exploring(nn.Module):
    """A selector in training: its scores with noise, their gradient without its mean.

    How many tokens a chunk keeps is fixed, so raising all scores alike changes nothing; but only
    kept tokens have a gradient, nearly all of them would like to be larger, and most tokens are
    silent: uncentred, the selector learns to keep what is frequent, loses the rare sounds, and
    without noise never meets them again.
    """

    def __init__(self, selector: AudioSelector, noise: float) -> None:
        """Wrap a selector; `noise` is the size of the Gumbel noise, 0: as published."""
        super().__init__()
        self.selector, self.noise = selector, noise

    def forward(self, video_CVD: Tensor, video_valid_CV: Tensor, audio_CAD: Tensor) -> Tensor:
        """Return the scores [C, A]."""
        score: Tensor = self.selector(video_CVD, video_valid_CV, audio_CAD)
        if not self.noise:
            return score
        mean = score.mean(1, keepdim=True)
        gumbel = -torch.log(-torch.log(torch.rand_like(score).clamp(1e-6, 1 - 1e-6)))
        return score - (mean - mean.detach()) + self.noise * gumbel


class Antithetic(nn.Module):
    """A selector whose scores are pushed by noise, and in the next call by the same turned round.

    What a model says of both selections tells which scores should be larger, also those of tokens
    that were dropped: the gradient of the expected loss by differences along random directions
    (evolution strategies, arXiv 1703.03864, section 2.1).
    """

    def __init__(self, selector: AudioSelector, noise: float) -> None:
        """Wrap a selector for two calls; `noise` is the standard deviation of what pushes."""
        super().__init__()
        self.selector, self.noise = selector, noise
        self.score: Tensor | None = None
        self.push: Tensor | None = None

    def forward(self, video_CVD: Tensor, video_valid_CV: Tensor, audio_CAD: Tensor) -> Tensor:
        """Return the pushed scores [C, A], without a gradient."""
        if self.score is None or self.push is None:
            self.score = self.selector(video_CVD, video_valid_CV, audio_CAD)
            self.push = self.noise * torch.randn_like(self.score)
            return self.score.detach() + self.push
        return self.score.detach() - self.push

    def loss(self, first_B: Tensor, second_B: Tensor) -> Tensor:
        """Return what has that gradient, from the losses of both selections of B videos.

        The chunks of each video have to follow one another, as many in each.
        """
        if self.score is None or self.push is None:
            raise RuntimeError("the losses are those of two calls")
        along_B = (self.score * self.push).reshape(len(first_B), -1).sum(1) / self.noise**2
        return ((first_B - second_B).detach() / 2 * along_B).mean()
