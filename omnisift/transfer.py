"""Copies between host and device that neither side waits for longer than it must."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Return int64 tensors on `device`, views of one buffer, for arrays of any shapes.

    One copy, from pinned memory: from pageable memory it would wait for all that the stream has
    still to do.
    """
    sizes = [array.size for array in arrays]
    joined = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays], out=joined.numpy())
    pieces = joined.to(device, non_blocking=True).split(sizes)
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors on the CPU: through pinned memory, and waiting once for all of them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return list(tensors)
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
