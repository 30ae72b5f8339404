"""What is trained: the thinker, the selector, and heads that only training has."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import inner, language_model
from omnisift.checkpoint import CheckpointError, published_name
from omnisift.mini import towers
from omnisift.mini.lessons import Lessons
from omnisift.mini.observe import observe
from omnisift.mini.pictures import ScenePlan
from omnisift.mini.sounds import SoundPlan
from omnisift.mini.world import ACTIONS, COLOURS, NOISES, SHAPES

Stage = Literal["backbone", "selector", "compressed"]

_TOWERS = ("visual.", "audio_tower.")  # one module down since transformers 5.23


class Student(nn.Module):
    """The parts of a training run that have weights."""

    def __init__(self, model: Any, selector: AudioSelector) -> None:
        """Take an untrained thinker or one that has been trained before."""
        super().__init__()
        self.model, self.selector = model, selector
        width = model.config.text_config.hidden_size
        self.sound_head = nn.Linear(width, len(NOISES) + 1)
        self.object_head = nn.Linear(width, 2)
        self.look_heads = nn.ModuleList(
            nn.Linear(width, size) for size in (len(COLOURS), len(SHAPES), len(ACTIONS) + 1)
        )
        self.cause_head = nn.Linear(width, len(COLOURS) + 1)

    @property
    def text(self) -> Any:
        """Return the LLM without the vocabulary's layers."""
        return language_model(self.model)

    def save(self, file: Path) -> None:
        """Write all weights, under names that do not depend on transformers' version."""
        save_file({_stored(name): value for name, value in self.state_dict().items()}, file)

    def restore(self, file: Path) -> None:
        """Take the weights of a file that `save` wrote.

        Raises CheckpointError with file and tensor where one is missing, unknown or misshapen.
        """
        own = {_stored(name): (name, value) for name, value in self.state_dict().items()}
        try:
            saved = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}") from error
        misfits = [
            *(f"{name} is missing" for name in sorted(own.keys() - saved.keys())),
            *(f"{name} is unknown" for name in sorted(saved.keys() - own.keys())),
            *(
                f"{name} is {list(saved[name].shape)} where {list(value.shape)} is expected"
                for name, (_, value) in own.items()
                if name in saved and saved[name].shape != value.shape
            ),
        ]
        if misfits:
            raise CheckpointError(f"{file}: {'; '.join(misfits[:3])} ({len(misfits)} misfits)")
        self.load_state_dict({own[name][0]: value for name, value in saved.items()})

    def trained(self, stage: Stage) -> dict[str, nn.Parameter]:
        """Return what a stage trains: all but the selector, the selector, it and the LLM."""
        heads = ("sound_head", "object_head", "look_heads", "cause_head")
        tower_names = tuple(f"model.{place}{name}" for place in ("", "model.") for name in _TOWERS)
        frozen = {
            "backbone": ("selector.",),
            "selector": ("model.", *heads),
            "compressed": (*tower_names, *heads),
        }[stage]
        chosen = {}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) and "audio_bos_eos" not in name)
            if parameter.requires_grad:
                chosen[name] = parameter
        return chosen


def _stored(name: str) -> str:
    inside = name.removeprefix("model.")
    return name if inside == name else published_name(inside)


def calibrate(student: Student, lessons: Lessons, device: torch.device) -> None:
    """Scale the first layers so that what leaves them is centred and of size 1.

    A log-mel spectrogram is nowhere near that: with plain initialisation sound is a tenth of the
    position code it is added to, and the model never learns to use it.
    """
    few = Lessons(lessons.text, seed=lessons.seed, steps=1, grids=64)[0]
    pictures, sounds = few.plans(device)
    student.to(device)
    # Shapes of its own, for one look: not worth compiling.
    with torch.compiler.set_stance("force_eager"):
        _calibrate(student, pictures, sounds, few.duration_s)


def _calibrate(student: Student, pictures: ScenePlan, sounds: SoundPlan, duration_s: int) -> None:
    seen = observe(pictures, sounds, duration_s, rough=True)
    tower = inner(student.model).audio_tower
    window = 2 * tower.n_window
    x = seen.mel.unflatten(-1, (-1, window)).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        for layer in (tower.conv1, tower.conv2):
            out = layer(x)
            mean, size = out.mean((0, 2)), out.std()
            layer.weight /= size
            layer.bias.copy_((layer.bias - mean) / size)
            x = F.gelu(layer(x))
        video = towers.encode_frames(student.model, seen.frames)
        audio = towers.encode_mel(student.model, seen.mel)
        size = student.model.get_input_embeddings().weight.std()
        for last, tokens in (
            (inner(student.model).visual.merger.mlp[-1], video),
            (tower.proj, audio),
        ):
            last.weight *= size / tokens.std()
