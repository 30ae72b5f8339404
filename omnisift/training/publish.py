"""Write what was trained as a checkpoint of the published layout.

The new checkpoint is the old one with the trained tensors exchanged: same files, same shards, same
types; what was not trained (towers, speech half) is copied. A selector that a sharded one lacks
gets a shard of its own, `model-compressor.safetensors`. One shard is in memory at a time.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from omnisift.checkpoint import SELECTOR_PREFIX, CheckpointError
from omnisift.training.state import wait, world

_COPIED = ("*.json", "*.jinja", "merges.txt")
_INDEX = "model.safetensors.index.json"
_ADDED = "model-compressor.safetensors"
_METADATA = {"format": "pt"}  # transformers asks for it


def publish(source: Path, target: Path, trained: Mapping[str, Tensor]) -> None:
    """Write to the folder `target` the checkpoint of `source` with its `trained` tensors.

    `trained` has published names (`thinker.model.layers.0...`, `thinker.compressor...`), as
    `PrunedLoss.trained` gives them. Every worker calls this; the first one writes. Raises
    CheckpointError, before anything is written, for a tensor that `source` has not, or not so.
    """
    shapes, index = _read_shapes(source), _read_index(source)
    names = _match(trained, shapes, source)
    files = {place for place, _ in shapes.values()}
    # Beside an index a selector gets a file; a checkpoint in one file stays in one.
    added = _ADDED if index else min(files)
    writes = world()[0] == 0
    partial = target.with_name(f"{target.name}.partial")
    if writes:
        _begin(partial, source, index, [name for name in names if name not in shapes])
    for shard in sorted({*files, added}):
        tensors = load_file(source / shard) if writes and shard in files else {}
        for name, published in names.items():
            if shapes.get(name, (added,))[0] != shard:
                continue
            value = _whole(trained[published])
            if writes:
                dtype = tensors[name].dtype if name in tensors else torch.bfloat16
                tensors[name] = value.to("cpu", dtype).contiguous()
        if tensors:
            save_file(tensors, partial / shard, _METADATA)
    if writes:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    wait()


def _begin(partial: Path, source: Path, index: dict[str, Any], new_names: Sequence[str]) -> None:
    """Make the folder and all its files but the tensors'."""
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    partial.mkdir(parents=True)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, partial / file.name)
    if index:
        weights = index["weight_map"] | dict.fromkeys(new_names, _ADDED)
        (partial / _INDEX).write_text(json.dumps({**index, "weight_map": weights}, indent=2))


def _read_shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the file and the shape of every tensor of a checkpoint."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = (file.name, handle.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    return shapes


def _match(
    trained: Mapping[str, Tensor], shapes: Mapping[str, tuple[str, list[int]]], source: Path
) -> dict[str, str]:
    """Return the trained tensors by their names in the checkpoint, in a fixed order."""
    names = {}
    for published in sorted(trained):
        # A checkpoint of the thinker alone leaves its prefix out, but for the selector.
        bare = published.removeprefix("thinker.")
        name = published if published in shapes or bare not in shapes else bare
        names[name] = published
        if name not in shapes and not name.startswith(SELECTOR_PREFIX):
            raise CheckpointError(f"{source}: no tensor {published} to exchange for the trained")
        expected = list(trained[published].shape)
        if name in shapes and shapes[name][1] != expected:
            file, found = shapes[name]
            raise CheckpointError(
                f"{source / file}: tensor {name}: trained as {expected}, it is {found} there"
            )
    return names


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a sharded checkpoint; empty for one of a single file."""
    file = folder / _INDEX
    if not file.exists():
        return {}
    try:
        index: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return index


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
