"""Make scenes heard: waveforms of many scenes at once, and what is heard in each audio token.

Shapes: B scenes, S sounds, N samples of a clip, n samples of a sound.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import tau
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisift.media import SAMPLE_RATE
from omnisift.mini import words
from omnisift.mini.world import AMBIENCES, NOISES, Noise, Scene

MAX_SOUNDS = 8
_LONGEST_S = 0.4
_SWEEP_S = 0.2
_NOTE_S = 0.25
_MAX_NOTES = 80
_SCALE = (0, 2, 4, 7, 9)  # pentatonic, in semitones
TOKENS_PER_SECOND = 25
AAC_FRAME = 1024  # samples


class SoundPlan(NamedTuple):
    """What is heard, as tensors; rows are padded with sounds of no loudness."""

    noise: Tensor  # [B, S] index in NOISES
    voice: Tensor  # [B, S] that says a word
    start: Tensor  # [B, S] seconds
    duration: Tensor  # [B, S]
    pitch: Tensor  # [B, S]
    loudness: Tensor  # [B, S]
    ambience: Tensor  # [B] index in AMBIENCES
    ambience_loudness: Tensor  # [B]
    notes: Tensor  # [B, notes] Hz
    seed: Tensor  # [B] of the noises


def plan_sounds(scenes: Sequence[Scene]) -> SoundPlan:
    """Gather the scenes' sounds and draw their ambience."""
    rows = []
    for scene in scenes:
        chance = np.random.default_rng(scene.texture_seed + 1)
        missing = MAX_SOUNDS - len(scene.sounds)
        columns = [
            np.array([NOISES.index(sound.noise) for sound in scene.sounds] + [0] * missing),
            np.array([sound.voice for sound in scene.sounds] + [0] * missing),
            *(
                np.array([getattr(sound, name) for sound in scene.sounds] + [fill] * missing)
                for name, fill in (
                    ("start_s", 0.0),
                    ("duration_s", 0.1),
                    ("pitch", 1.0),
                    ("loudness", 0.0),
                )
            ),
        ]
        steps = chance.choice(_SCALE, _MAX_NOTES) + 12 * chance.integers(0, 2, _MAX_NOTES)
        loudness = {"nothing": 0.0, "noise": (0.01, 0.04), "music": (0.04, 0.1)}[scene.ambience]
        rows.append(
            [
                *columns,
                np.array(AMBIENCES.index(scene.ambience)),
                np.array(chance.uniform(*loudness) if isinstance(loudness, tuple) else 0.0),
                220.0 * chance.uniform(0.9, 1.2) * 2 ** (steps / 12),
                np.array(scene.texture_seed % 2**31),
            ]
        )
    stacked = [np.stack(column) for column in zip(*rows, strict=True)]
    return SoundPlan(
        *(
            torch.from_numpy(column.astype(np.float32 if column.dtype.kind == "f" else np.int64))
            for column in stacked
        )
    )


def render(plan: SoundPlan, duration_s: int) -> Tensor:
    """Return the waveforms, float32 [B, N] mono at 16 kHz."""
    device = plan.start.device
    num_samples = duration_s * SAMPLE_RATE
    sounds = _sounds(plan)
    wave = torch.zeros(len(plan.start), num_samples + sounds.shape[-1], device=device)
    first = (plan.start * SAMPLE_RATE).long().clamp(0, num_samples)
    place = first[..., None] + torch.arange(sounds.shape[-1], device=device)
    wave = wave.scatter_add(1, place.flatten(1), sounds.flatten(1))[:, :num_samples]
    return (wave + _ambience(plan, num_samples)).clamp(-1, 1)


def _white(shape: tuple[int, ...], seed: Tensor) -> Tensor:
    """Return noise in [-1, 1), the same on every device: a hash of the seed and the index."""
    index = torch.arange(int(np.prod(shape[1:])), device=seed.device)
    mixed = (index[None] * 1_103_515_245 + seed[:, None] * 12_345 + 1) % 2_147_483_647
    mixed = (mixed * 48_271) % 2_147_483_647
    mixed = (mixed * 69_621) % 2_147_483_647
    return (mixed.float() / 1_073_741_824 - 1).view(shape)


def _sounds(plan: SoundPlan) -> Tensor:
    """Return each sound on its own, [B, S, n]."""
    length = int(_LONGEST_S * SAMPLE_RATE)
    time = torch.arange(length, device=plan.start.device) / SAMPLE_RATE
    pitch = plan.pitch[..., None]
    hiss = _white((*plan.start.shape, length), plan.seed)

    def tone(hertz: float) -> Tensor:
        return torch.sin(tau * hertz * pitch * time)

    def sweep(begin: float, end: float) -> Tensor:
        reached = begin * time + (end - begin) * time**2 / (2 * _SWEEP_S)
        return torch.sin(tau * pitch * reached)

    def decay(seconds: float) -> Tensor:
        return torch.exp(-time / seconds)

    def said(word: words.Word) -> Tensor:
        samples = torch.from_numpy(words.spoken()[words.WORDS.index(word)]).to(time.device)
        # Between two samples in a straight line; a zero stands behind the last.
        samples = torch.nn.functional.pad(samples, (0, 1))
        place = (time * SAMPLE_RATE * pitch).clamp(max=samples.shape[-1] - 1.001)
        first = place.long()
        before, behind = (samples[plan.voice[..., None], first + step] for step in (0, 1))
        return before + (place - first) * (behind - before)

    voices: dict[Noise, Callable[[], Tensor]] = {
        "bell": lambda: (tone(880) + 0.6 * tone(2429) + 0.4 * tone(4752)) / 2 * decay(0.09),
        "whistle": lambda: torch.sin(tau * 2100 * pitch * time + 2.5 * torch.sin(tau * 30 * time)),
        "drum": lambda: (0.8 * sweep(190, 60) + 0.2 * hiss * decay(0.02)) * decay(0.1),
        "buzzer": lambda: tone(140).sign() * 0.7,
        "chirp": lambda: sweep(1300, 4300),
        "horn": lambda: sum((tone(330 * n) / n for n in range(1, 7)), torch.zeros(())) / 1.8,
        "click": lambda: hiss * torch.exp(-(time % 0.03) / 0.004),
        "beep": lambda: tone(1000),
        **{word: partial(said, word) for word in words.WORDS},
    }
    wave = torch.zeros_like(hiss)
    for index, noise in enumerate(NOISES):
        wave = torch.where(plan.noise[..., None] == index, voices[noise](), wave)
    ends = ((plan.duration[..., None] - time) / 0.005).clamp(0, 1) * (time / 0.003).clamp(max=1)
    return wave * ends * plan.loudness[..., None]


def _ambience(plan: SoundPlan, num_samples: int) -> Tensor:
    time = torch.arange(num_samples, device=plan.start.device) / SAMPLE_RATE
    hiss = _white((len(plan.seed), num_samples), plan.seed + 7)
    # Four neighbours averaged: duller than white, so that clicks and drums stand out of it.
    hiss = torch.nn.functional.avg_pool1d(hiss[:, None], 4, 1, 2)[:, 0, :num_samples] * 1.6
    note = (time / _NOTE_S).long()
    since = time - note * _NOTE_S
    hertz = plan.notes[:, note]
    music = torch.sin(tau * hertz * since) + 0.4 * torch.sin(tau * 2 * hertz * since)
    music = music * (since / 0.01).clamp(max=1) * torch.exp(-since / 0.15)
    kind = plan.ambience[:, None]
    chosen = torch.where(kind == AMBIENCES.index("music"), music, torch.zeros_like(music))
    chosen = torch.where(kind == AMBIENCES.index("noise"), hiss, chosen)
    return chosen * plan.ambience_loudness[:, None]


def heard(plan: SoundPlan, num_tokens: int) -> Tensor:
    """Return which sound each audio token carries, [B, tokens] (-1: none): over 10 ms of it."""
    begin = torch.arange(num_tokens, device=plan.start.device) / TOKENS_PER_SECOND
    overlap = torch.minimum(
        begin[:, None] + 1 / TOKENS_PER_SECOND, (plan.start + plan.duration)[:, None, :]
    ) - torch.maximum(begin[:, None], plan.start[:, None, :])
    overlap = overlap * (plan.loudness > 0)[:, None, :]
    longest, which = overlap.max(-1)
    return torch.where(longest > 0.01, which, -1)
