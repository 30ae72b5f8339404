"""Compile what a GPU would run as dozens of small kernels; a CPU runs it as it is written."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors when its first one is on a GPU: for the shapes it meets.

    Shapes that are left open take minutes to compile, so callers keep them few.
    """

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        return (compiled() if first.is_cuda else function)(*args, **kwargs)

    return call
