"""What a run needs to go on: weights and optimiser state, in safetensors and JSON.

`<folder>/state-<step>/` holds one file a worker, with the worker's own shards, and run.json.
A state is made under another name and renamed when it is complete; then the older one goes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_PREFIX = "state-"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class TrainingError(Exception):
    """Training cannot go on; the message names what has to be mended."""


def world() -> tuple[int, int]:
    """Return this worker's rank and the number of workers; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def states(folder: Path) -> list[Path]:
    """Return the complete states in a folder, the newest last."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))


def save(
    folder: Path,
    step: int,
    run: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Keep the state behind `step` steps; every worker calls it, on a file system they share."""
    rank, workers = world()
    complete = folder / f"{_PREFIX}{step}"
    partial = folder / f"{_PREFIX}{step}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        partial.mkdir(parents=True)
    wait()
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach()
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}/{name}"] = value
    # A copy each: safetensors refuses tensors that share memory, as tied or sharded ones may.
    save_file(
        {name: _local(value).cpu().clone().contiguous() for name, value in tensors.items()},
        partial / _file(rank),
    )
    wait()
    if rank == 0:
        facts = {"step": step, "workers": workers, **run}
        (partial / "run.json").write_text(json.dumps(facts, indent=1))
        shutil.rmtree(complete, ignore_errors=True)
        partial.rename(complete)
        for older in states(folder):
            if older != complete:
                shutil.rmtree(older)
    wait()


def load_newest(
    folder: Path,
    run: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Read the newest state into parameters and optimiser; return its step, 0 without a state.

    Raises TrainingError where it belongs to another run or another number of workers, and where
    its tensors do not fit the parameters.
    """
    found = states(folder)
    if not found:
        return 0
    newest = found[-1]
    rank, workers = world()
    try:
        facts = json.loads((newest / "run.json").read_text())
        tensors = load_file(newest / _file(rank))
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"{newest}: the state cannot be read: {error}") from error
    for key, expected in {**run, "workers": workers}.items():
        if facts.get(key) != expected:
            raise TrainingError(
                f"{newest}: made by a run with {key} {_short(facts.get(key))}, this one has "
                f"{_short(expected)}; use another folder, or the command of that run"
            )
    step: int = facts["step"]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(parameter, _take(tensors, f"weight/{name}", parameter, newest)))
            if f"step/{name}" in tensors:  # a parameter that never had a gradient has none
                optimizer.state[parameter] = _moments(tensors, name, parameter, newest, optimizer)
    return step


def _moments(
    tensors: Mapping[str, Tensor],
    name: str,
    parameter: nn.Parameter,
    source: Path,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    moments = {}
    for moment in _MOMENTS:
        key = f"{moment}/{name}"
        if moment == "step":  # a scalar, on the host unless the optimiser is fused
            count = tensors[key]
            moments[moment] = count.to(parameter.device) if optimizer.defaults["fused"] else count
        else:
            moments[moment] = _like(parameter, _take(tensors, key, parameter, source))
    return moments


def _take(tensors: Mapping[str, Tensor], key: str, parameter: Tensor, source: Path) -> Tensor:
    expected = list(_local(parameter).shape)
    if key not in tensors or list(tensors[key].shape) != expected:
        found = list(tensors[key].shape) if key in tensors else "none"
        raise TrainingError(f"{source}: tensor {key}: expected {expected}, got {found}")
    return tensors[key]


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    local = local.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return local


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _file(rank: int) -> str:
    return f"worker-{rank}.safetensors"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def wait() -> None:
    """Return when all workers are here."""
    if world()[1] > 1:
        dist.barrier()
