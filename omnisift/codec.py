"""Kept tokens as bytes, exactly or in half the room.

Shapes: n tokens, D width. All bytes are little endian.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Codec = Literal["float32", "bfloat16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)


def encode(tokens: Tensor, codec: Codec) -> bytes | memoryview:
    """Return tokens [n, D] as bytes.

    float32 and bfloat16: the values, row by row; of tokens of that type on the CPU not a copy but
    a view. int8: the values divided by their token's scale
    and rounded to -127..127, row by row, then the n scales as float32. A token's scale is its
    largest magnitude / 127, so that no value is off by more than half a scale.
    """
    if codec == "float32":
        return _view(tokens.float())
    if codec == "bfloat16":
        return _view(tokens.bfloat16().view(torch.int16))
    values = tokens.float()
    scale = values.abs().amax(dim=1) / 127
    steps = values / torch.where(scale > 0, scale, 1.0)[:, None]
    rounded = steps.round().clamp(-127, 127).to(torch.int8)
    return rounded.cpu().numpy().tobytes() + scale.cpu().numpy().tobytes()


def _view(values: Tensor) -> memoryview:
    return values.cpu().contiguous().numpy().reshape(-1).view(np.uint8).data


def decode(
    data: bytes | memoryview,
    codec: Codec,
    shape: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the tokens [n, D] on `device`, int8 as float32; the bytes travel there encoded.

    Raises ValueError when the number of bytes is not that of the shape.
    """
    num_tokens = shape[0]
    size = math.prod(shape)
    bytes_per_value = {"float32": 4, "bfloat16": 2, "int8": 1}[codec]
    expected = size * bytes_per_value + (4 * num_tokens if codec == "int8" else 0)
    if len(data) != expected:
        raise ValueError(f"{codec} tokens {list(shape)} take {expected} bytes, got {len(data)}")

    def read(dtype: type[np.generic], count: int, offset: int = 0) -> Tensor:
        # A copy: torch wants memory that may be written, a block's may not.
        return torch.from_numpy(np.frombuffer(data, dtype, count, offset).copy()).to(device)

    if codec == "float32":
        return read(np.float32, size).view(shape)
    if codec == "bfloat16":
        return read(np.int16, size).view(torch.bfloat16).view(shape)
    scale = read(np.float32, num_tokens, offset=size)
    return read(np.int8, size).view(shape).float() * scale[:, None]
