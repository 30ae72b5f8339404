"""How much memory tensors take at their most: counted storage by storage, on any device."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts what operations allocate inside of it, and what is freed again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = self._storages((args, kwargs))
        result = operation(*args, **(kwargs or {}))
        for address, storage in self._storages(result).items():
            if address not in self._alive and address not in given:
                self._alive.add(address)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, address, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    @staticmethod
    def _storages(tree: Any) -> dict[int, Any]:
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}

    def _free(self, address: int, num_bytes: int) -> None:
        self._alive.discard(address)
        self.now -= num_bytes
