"""Folder or hub id -> backbone + selector. Unknown or missing tensors are errors, never skipped."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.utils import logging

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone

Part = Literal["all", "towers", "language_model"]

SELECTOR_PREFIX = "thinker.compressor."
_SMALL_FILES = ["*.json", "merges.txt", "*.jinja"]
# The speech half of a full checkpoint, and the selector, which is read on its own.
_NOT_THE_THINKERS = re.compile(r"^(talker|token2wav|(thinker\.)?compressor)\.")
_LAYERS_LEFT_OUT = {
    "all": re.compile(r"$^"),
    "towers": re.compile(r"(^|\.)(model|language_model)\.layers\.\d+\."),
    "language_model": re.compile(r"(^|\.)(visual\.blocks|audio_tower\.layers)\.\d+\."),
}


class CheckpointError(Exception):
    """A checkpoint that is not what it should be; the message names tensor and file."""


def resolve(model: str, revision: str = "main", *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint; a hub id is downloaded (safetensors, JSON, vocabulary).

    Without `weights` only the shards that hold a selector are: a driver on a machine of its own
    needs no more. Raises CheckpointError for what is neither folder nor hub id.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"model={model}: the folder has no config.json")
        return folder
    folder = _download(model, revision, _SMALL_FILES)
    places = _weight_map(folder)
    wanted = {file for name, file in places.items() if weights or name.startswith(SELECTOR_PREFIX)}
    if not places:  # any file may hold any tensor
        wanted = {"*.safetensors"}
    if wanted:
        _download(model, commit_of(folder) or revision, sorted(wanted))
    for file in sorted(wanted):
        if not any(folder.glob(file)):  # a cache that was filled in part, without a network
            raise CheckpointError(f"model={model}: {folder} lacks {file}; download it again")
    return folder


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, as the checkpoint's index says; empty: it has none."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index}: not an index of tensors: {error!r}") from error
    return places


def _download(model: str, revision: str, patterns: list[str]) -> Path:
    try:
        downloaded = snapshot_download(model, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model={model}: neither a folder here nor a hub id that can be downloaded ({reason})"
        ) from error
    return Path(downloaded)


def commit_of(folder: Path) -> str | None:
    """Return the commit of a checkpoint that `resolve` downloaded; None for any other folder."""
    # Of its cache's layout: <cache>/models--<owner>--<name>/snapshots/<commit>
    downloaded = (
        re.fullmatch("[0-9a-f]{40}", folder.name)
        and folder.parent.name == "snapshots"
        and folder.parents[1].name.startswith("models--")
    )
    return folder.name if downloaded else None


def identity(folder: Path) -> str:
    """Return what changes with the checkpoint: its commit, or a hash of files' names, sizes, times.

    Weights are not read: 18 GB every night would be. So a download is the same on every machine, a
    folder copied by hand counts as another one.
    """
    commit = commit_of(folder)
    if commit is not None:
        return commit
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    # It warns of ids of the speech half, which is not loaded, and reports the layers left out
    # on purpose; what does not fit is an error of ours.
    settings: Any = logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def thinker_config(folder: Path) -> Any:
    """Return the thinker's transformers configuration of a checkpoint."""
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    config = getattr(config, "thinker_config", config)
    if not isinstance(config, Qwen2_5OmniThinkerConfig):
        raise CheckpointError(
            f"{folder / 'config.json'}: expected model_type qwen2_5_omni, got {config.model_type}"
        )
    llm: Any = config.text_config
    if set(llm.layer_types) - {"full_attention"}:
        raise CheckpointError(
            f"{folder / 'config.json'}: an LLM that sees a sliding window alone is not supported; "
            "Qwen2.5-Omni's has use_sliding_window false"
        )
    return config


def load_backbone(
    folder: Path, *, part: Part = "all", device: str | torch.device = "cpu"
) -> Backbone:
    """Load the thinker in bfloat16 on a GPU, in float32 on a CPU.

    `part` leaves out the layers that are not needed: "towers" the LLM's (the text embedding
    stays), "language_model" those of the vision and audio towers. Raises CheckpointError with
    the tensors' names where the files and the configuration do not fit each other.
    """
    device = torch.device(device)
    config = thinker_config(folder)
    if part == "towers":
        config.text_config.num_hidden_layers = 0
        config.text_config.layer_types = []
    elif part == "language_model":
        config.vision_config.depth = 0
        config.audio_config.encoder_layers = 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        with _quiet_transformers():
            loaded: Any = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that all of them are named below
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model, info = loaded
    _refuse_misfits(folder, info, part)
    return Backbone(model.to(device))


def published_name(name: str) -> str:
    """Return a thinker tensor's name in the published checkpoint.

    transformers moved the modules between 5.17 and 5.23 (`model.visual`, `model.language_model`).
    """
    for new, old in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("model.audio_tower.", "audio_tower."),
    ):
        if name.startswith(new):
            name = old + name.removeprefix(new)
            break
    return f"thinker.{name}"


def tensor_places(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a checkpoint, from the files' heads."""
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                places |= dict.fromkeys(handle.keys(), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    return places


def _refuse_misfits(folder: Path, info: dict[str, Any], part: Part) -> None:
    unexpected = [
        name
        for name in info["unexpected_keys"]
        if not _NOT_THE_THINKERS.search(name) and not _LAYERS_LEFT_OUT[part].search(name)
    ]
    shapes = {name: (list(found), list(asked)) for name, found, asked in info["mismatched_keys"]}
    if not (unexpected or shapes or info["missing_keys"]):
        return
    places = tensor_places(folder)

    def place(name: str) -> str:
        names = (published_name(name), published_name(name).removeprefix("thinker."), name)
        known = next((known for known in names if known in places), names[0])
        files = [places[known]] if known in places else sorted({*places.values()})
        listed = ", ".join(file.name for file in files)
        return f"{known} (in {'' if known in places else 'none of '}{listed})"

    problems = [
        f"{word} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for word, names in (
            ("missing", [place(name) for name in sorted(info["missing_keys"])]),
            ("unexpected", [place(name) for name in sorted(unexpected)]),
            (
                "wrongly shaped",
                [
                    f"{place(name)}: expected {asked}, got {found}"
                    for name, (found, asked) in sorted(shapes.items())
                ],
            ),
        )
        if names
    ]
    raise CheckpointError(f"{folder}: tensors do not fit config.json: {'; '.join(problems)}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder}: no tokenizer.json or vocab.json")
    try:
        with _quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error
    return tokenizer


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SelectorWeights:
    """The weights of a selector and where they came from."""

    tensors: dict[str, Tensor]  # AudioSelector's names; empty: there are none
    source: str
    places: dict[str, Path] = field(default_factory=dict)  # the file of each tensor

    @property
    def trained(self) -> bool:
        """Return whether there are weights; otherwise the selector is random."""
        return bool(self.tensors)

    @property
    def sha256(self) -> str:
        """Return the hash of names and values, "untrained" without any."""
        return hash_tensors(self.tensors) if self.tensors else "untrained"


def read_selector(folder: Path, selector_file: str = "") -> SelectorWeights:
    """Read the selector's tensors from a file of its own or from a checkpoint's shards.

    In both they stand under `thinker.compressor.`; a file of its own may leave the prefix out.
    """
    shards = [Path(selector_file)] if selector_file else sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    if name.startswith(SELECTOR_PREFIX) or selector_file:
                        bare = name.removeprefix(SELECTOR_PREFIX)
                        tensors[bare], places[bare] = handle.get_tensor(name), shard
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{shard}: {error}") from error
    if selector_file and not tensors:
        raise CheckpointError(f"compression.selector={selector_file}: the file holds no tensors")
    return SelectorWeights(tensors, selector_file or str(folder), places)


def build_selector(weights: SelectorWeights, width: int, *, seed: int = 0) -> AudioSelector:
    """Make the selector of `weights` in float32; without any, a random one from `seed`.

    Raises CheckpointError naming a tensor that is missing, unknown or wrongly shaped.
    """
    if not weights.trained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AudioSelector(width)
    hidden = weights.tensors["v_proj.bias"].shape[0] if "v_proj.bias" in weights.tensors else 512
    selector = AudioSelector(width, hidden)
    expected = {name: list(value.shape) for name, value in selector.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{weights.places.get(name, weights.source)}: selector tensor {name}: expected "
                f"{expected.get(name, 'none of this name')}, got {found.get(name, 'none')}"
            )
    selector.load_state_dict({name: value.float() for name, value in weights.tensors.items()})
    return selector
