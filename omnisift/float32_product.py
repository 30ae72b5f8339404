"""float32 matrix products on a GPU's bfloat16 units.

Hopper multiplies float32 at a tenth of its bfloat16 rate. A float32 number is the sum of three
bfloat16 ones; products of those are exact and are summed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b in the weight's type, for x [..., D] of any type.

    On a GPU and without autograd, float32 weights meet
    - bfloat16 x as two terms: exact for weights that bfloat16 holds (a published selector's),
      else within 2^-17;
    - float32 x as six products of three terms each, within 2^-23, as rounding is.
    """
    if not x.is_cuda or weight.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x.to(weight.dtype), weight, bias)
    rows = x.flatten(0, -2)
    if x.dtype == torch.bfloat16:
        both = torch.mm(rows, torch.cat(_terms(weight, 2)).T, out_dtype=torch.float32)
        high, low = both.chunk(2, dim=-1)
        product = high + low
    else:
        x0, x1, x2 = _terms(rows.float(), 3)
        w0, w1, w2 = _terms(weight, 3)
        product = torch.mm(
            torch.cat((x2, x1, x0, x1, x0, x0), dim=1),  # the small ones are summed first
            torch.cat((w0, w1, w2, w0, w1, w0), dim=1).T,
            out_dtype=torch.float32,
        )
    return (product + bias).view(*x.shape[:-1], -1)


def _terms(x: Tensor, count: int) -> list[Tensor]:
    """Return bfloat16 tensors whose sum is float32 `x`: within 2^-17 with two, exactly with three.

    Rounded by hand, half away from zero: a compiler takes a cast there and back for nothing to
    do, and the later terms would be zero.
    """
    terms = []
    for _ in range(count):
        rounded = ((x.contiguous().view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
        terms.append(rounded.bfloat16())
        x = x - rounded
    return terms
