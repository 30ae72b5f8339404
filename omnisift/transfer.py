"""Copies between host and device that neither side waits for.

A copy runs on a stream of its own, beside the kernels, and only from or to pinned memory: from
pageable memory the host would wait until all the GPU has still to do is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return the streams of the copies to `device` and back from it."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def upload(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Return int64 tensors on `device`, views of one buffer, for arrays of any shapes.

    One copy, in the order of the kernels: it is small and they need it at once.
    """
    sizes = [array.size for array in arrays]
    joined = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays], out=joined.numpy())
    pieces = joined.to(device, non_blocking=True).split(sizes)
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def upload_media(media: Tensor, device: torch.device) -> Tensor:
    """Return frames or sound on `device`, copied while it still computes what came before."""
    if device.type != "cuda" or media.device.type != "cpu":
        return media.to(device)
    pinned = torch.empty(media.shape, dtype=media.dtype, pin_memory=True)
    # numpy copies in this thread; torch would wake one for each core, which decoding needs.
    np.copyto(pinned.numpy(), media.numpy())
    to_device, _ = _streams(device)
    with torch.cuda.stream(to_device):
        copied = pinned.to(device, non_blocking=True)
    kernels = torch.cuda.current_stream(device)
    kernels.wait_stream(to_device)
    copied.record_stream(kernels)
    return copied


@dataclass(frozen=True)
class Download:
    """Tensors on their way to the CPU."""

    tensors: list[Tensor]  # of no meaning before `wait`
    arrived: torch.cuda.Event | None  # None: they were there already

    def wait(self) -> list[Tensor]:
        """Return the tensors once they are there; other threads may go on meanwhile."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def start_download(tensors: Sequence[Tensor]) -> Download:
    """Copy tensors to the CPU behind the kernels queued so far, and beside those that follow."""
    if not any(tensor.is_cuda for tensor in tensors):
        return Download(list(tensors), None)
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    device = tensors[0].device
    _, from_device = _streams(device)
    from_device.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(from_device):
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(from_device)
        # blocking: the host sleeps rather than spins on a core that decoding needs
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(from_device)
    return Download(copies, arrived)
