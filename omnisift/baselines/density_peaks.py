"""Density peaks: which tokens of a grid stand for the others?

Shapes: G grids, N tokens of a grid (padded), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NEIGHBOURS = 5


def density_peaks(grid_GND: Tensor, valid_GN: Tensor) -> Tensor:
    """Return density * delta, float32 [G, N]: high for the centre of a cluster.

    Distance is 1 - cosine. density = exp(-mean distance of the 5 nearest others, or of all where
    there are fewer), delta = distance to the nearest denser token; where none is denser, to the
    farthest. OmniZip (arXiv 2511.14582), section on spatial compression.
    """
    tokens = F.normalize(grid_GND.detach().float(), dim=-1)
    distance = 1 - tokens @ tokens.mT
    num_tokens = valid_GN.shape[1]
    itself = torch.eye(num_tokens, dtype=torch.bool, device=distance.device)
    other = valid_GN[:, None, :] & ~itself
    nearest = distance.masked_fill(~other, torch.inf)
    nearest = nearest.topk(min(_NEIGHBOURS, num_tokens), largest=False).values
    found = nearest.isfinite()
    mean = nearest.masked_fill(~found, 0).sum(-1) / found.sum(-1).clamp(min=1)
    density = torch.exp(-mean)
    denser = other & (density[:, None, :] > density[:, :, None])
    nearest_denser = distance.masked_fill(~denser, torch.inf).amin(-1)
    farthest = distance.masked_fill(~other, 0).amax(-1)
    return density * torch.where(denser.any(-1), nearest_denser, farthest)
