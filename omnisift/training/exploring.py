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
