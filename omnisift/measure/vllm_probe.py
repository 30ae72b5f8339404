"""See from outside what vLLM hands to the model: an extension of its worker."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Probe:
    """Methods that vLLM's worker gets (`worker_extension_cls`) and `collective_rpc` calls."""

    model_runner: Any
    _positions: list[Tensor]
    _hook: RemovableHandle

    def watch_positions(self) -> None:
        """From now on keep the positions of every step that runs the model's Python."""
        self._positions = []

        def keep(_model: nn.Module, _args: Any, given: dict[str, Any]) -> None:
            self._positions.append(given["positions"].detach().cpu().clone())

        model = self.model_runner.get_model()
        self._hook = model.register_forward_pre_hook(keep, with_kwargs=True)

    def stop_watching(self) -> None:
        """Watch no longer: it makes every step wait for the GPU."""
        self._hook.remove()

    def take_positions(self) -> list[list[list[int]]]:
        """Return the positions [3, L] of each step since the last call."""
        seen = [positions.tolist() for positions in self._positions]
        self._positions.clear()
        return seen
