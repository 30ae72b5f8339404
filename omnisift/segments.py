"""Attention inside segments of one long sequence: windows and frames without a call for each.

Shapes: T rows, H heads, d width of a head, S segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from omnisift.transfer import upload


class Segments(NamedTuple):
    """Consecutive rows that attend to one another and to nobody else."""

    ends: Tensor  # int32 [S + 1]: 0, then the end of each segment
    longest: int
    # For each length that occurs, the rows of its segments [n, length]; a single length needs
    # no rows. None where the flash kernel reads `ends` itself.
    by_length: tuple[Tensor, ...] | None


def has_varlen(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Return whether torch's flash kernel for segments runs here.

    It wants 16 bits, a GPU from Ampere on, and heads of a width that 8 divides.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_width % 8 == 0
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def make_segments(lengths: NDArray[np.int64], device: torch.device, *, varlen: bool) -> Segments:
    """Describe segments of these lengths, for the flash kernel or for batches of equal length."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    arrays = [ends]
    if not varlen:
        starts = ends[:-1]
        arrays += [
            starts[lengths == length][:, None] + np.arange(length) for length in np.unique(lengths)
        ]
    on_device = upload(arrays, device)
    return Segments(
        on_device[0].int(), int(lengths.max()), None if varlen else tuple(on_device[1:])
    )


def attend(query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, segments: Segments) -> Tensor:
    """Return softmax(q k / sqrt(d)) v, [T, H, d], each row over its segment."""
    ends, longest, by_length = segments
    if by_length is None:
        attended = varlen_attn(query_THd, key_THd, value_THd, ends, ends, longest, longest)
        assert isinstance(attended, Tensor)  # a pair only where it is asked for more
        return attended
    if len(by_length) == 1:
        shape = (*by_length[0].shape, *query_THd.shape[1:])
        return _batched(*(x.reshape(shape) for x in (query_THd, key_THd, value_THd))).flatten(0, 1)
    result = torch.empty_like(query_THd)
    for rows in by_length:
        result[rows] = _batched(query_THd[rows], key_THd[rows], value_THd[rows])
    return result


def _batched(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def pack_linears(linears: Sequence[nn.Linear], *, rows: int) -> tuple[Tensor, Tensor]:
    """Stack linears over one input into weight [n * rows, D], bias [n * rows], padded with zeros.

    The linears' own weights become views of the result: nothing is stored twice, and the stock
    modules go on computing what they did.
    """
    width = linears[0].in_features
    weight = linears[0].weight.new_zeros(len(linears), rows, width)
    bias = linears[0].weight.new_zeros(len(linears), rows)
    for number, linear in enumerate(linears):
        size = linear.out_features
        linear.weight.data = weight[number, :size].copy_(linear.weight.data)
        if linear.bias is not None:
            linear.bias.data = bias[number, :size].copy_(linear.bias.data)
    return weight.flatten(0, 1), bias.flatten(0, 1)
