"""STVP, spatio-temporal video pruning: how replaceable is each video token?

Shapes: C chunks, N tokens of a grid (padded), D width.
"""

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-8  # F.cosine_similarity's: a blank token is like nothing


def spatial_similarity(grid_CND: Tensor, valid_CN: Tensor) -> Tensor:
    """Return the cosine, float32 [C, N], of each token with the mean of its grid's tokens."""
    tokens = grid_CND.float()
    count = valid_CN.sum(1, keepdim=True).clamp(min=1)
    mean = (tokens * valid_CN[..., None]).sum(1) / count
    return _cosine(tokens, mean[:, None])


def temporal_similarity(second_CND: Tensor, first_CND: Tensor) -> Tensor:
    """Return the cosine, float32 [C, N], of each token with its twin, unpruned, a grid before."""
    return _cosine(second_CND.float(), first_CND.float())


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    # F.cosine_similarity divides before it sums, which takes a second pass over the tokens.
    norms = [torch.linalg.vector_norm(x, dim=-1).clamp(min=_SMALLEST_NORM) for x in (one, other)]
    cosine: Tensor = (one * other).sum(-1) / (norms[0] * norms[1])
    return cosine


def drop_highest(score_CN: Tensor, valid_CN: Tensor, num_dropped_C: Tensor) -> Tensor:
    """Return the mask [C, N] of the tokens kept when each row loses its highest scores.

    Of equal scores the lower index goes first, so that every device decides alike.
    """
    score = score_CN.detach().masked_fill(~valid_CN, -torch.inf)
    order = score.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(score.shape[1], device=score.device)
    survives = (rank >= num_dropped_C[:, None]).expand_as(score)
    return torch.zeros_like(valid_CN).scatter(1, order, survives) & valid_CN
