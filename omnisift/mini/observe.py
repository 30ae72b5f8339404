"""A lesson as the towers read it, roughened as codecs, cameras and microphones do, with its labels.

Shapes: B scenes, T frames, G grids, N tokens of a grid, A audio tokens, K objects, E events.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisift.layout import num_audio_tokens
from omnisift.media import FACTOR, log_mel
from omnisift.mini.fused import fused
from omnisift.mini.pictures import ScenePlan, draw
from omnisift.mini.sounds import AAC_FRAME, SoundPlan, heard, render
from omnisift.mini.world import ACTION_S, ACTIONS

FPS = 2
_SAMPLES = 7  # of the owner map along a token's side
_OBJECT_SHARE = 0.1  # of a token's pixels, from which on it shows an object


class Seen(NamedTuple):
    """A lesson as the towers read it, and what its tokens show."""

    frames: Tensor  # [B, T, 3, H, W] in [0, 1]
    mel: Tensor  # [B, 128, F]
    owner: Tensor  # [B, G, N] object of each video token, -1 for none
    action: Tensor  # [B, G, K] index in ACTIONS, len(ACTIONS) for none
    sound: Tensor  # [B, A] index of the sound of each audio token, -1 for none


def observe(
    pictures: ScenePlan,
    sounds: SoundPlan,
    duration_s: int,
    *,
    rough: bool,
    tail_samples: int = 0,
) -> Seen:
    """Draw and sound a lesson; `rough` adds what codecs, cameras and microphones do.

    The sound goes on for `tail_samples` behind the end, as a codec leaves it: nothing sounds there.
    """
    device = pictures.radius.device
    times = torch.arange(duration_s * FPS, device=device) / FPS
    frames, owner = draw(pictures, times)
    wave = render(sounds, duration_s)
    if rough:
        frames, wave = _roughen_frames(frames), _roughen_wave(wave)
    if tail_samples:
        wave = torch.cat([wave, _tail(wave, tail_samples)], dim=1)
    mel = log_mel(wave)
    return Seen(
        frames,
        mel,
        _token_owner(owner, pictures.radius.shape[1]),
        _grid_action(pictures, times),
        heard(sounds, num_audio_tokens(mel.shape[-1])),
    )


def _roughen_frames(frames: Tensor) -> Tensor:
    batch, num, _, height, width = frames.shape
    device = frames.device
    soft, gain = (
        torch.rand(batch, 1, device=device).expand(-1, num).reshape(-1, 1, 1, 1) for _ in range(2)
    )
    # Blocks of 8 that are off by a shade, and noise.
    shade = torch.randn(batch * num, 1, height // 8, width // 8, device=device)
    noise = torch.randn(batch * num, 1, height, width, device=device)
    rough = _blur(frames.flatten(0, 1), 0.5 * soft, 0.97 + 0.06 * gain, 0.006 * shade, 0.01 * noise)
    return rough.view_as(frames)


@fused
def _blur(frames: Tensor, soft: Tensor, gain: Tensor, shade: Tensor, noise: Tensor) -> Tensor:
    # Colour at half the resolution, as 4:2:0 has it; sharpness lost to scaling.
    small = F.avg_pool2d(frames, 2)
    coarse = small.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    luma = torch.tensor((0.299, 0.587, 0.114), device=frames.device)[:, None, None]
    bright = ((frames - coarse) * luma).sum(1, keepdim=True)
    shade = shade.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)
    out = (coarse + (1 - soft) * bright) * gain + shade + noise
    return (out.clamp(0, 1) * 255).round() / 255


def _roughen_wave(wave: Tensor) -> Tensor:
    batch, device = len(wave), wave.device
    gain = 0.5 + 0.7 * torch.rand(batch, 1, device=device)
    floor = 10 ** (-4.5 + 1.5 * torch.rand(batch, 1, device=device))
    # A low pass of two samples, as strong as chance has it.
    soft = 0.5 * torch.rand(batch, 1, device=device)
    wave = (1 - soft) * wave + soft * F.pad(wave, (1, 0))[:, :-1]
    return wave * gain + floor * torch.randn_like(wave)


def _tail(wave: Tensor, num_samples: int) -> Tensor:
    last = wave[:, -AAC_FRAME:].square().mean(1, keepdim=True).sqrt()
    # AAC at 64 kbit/s leaves .001 to .02 of how loud the last frame was.
    trace = last * 10 ** (-3 + 1.3 * torch.rand_like(last))
    return trace * torch.randn(len(wave), num_samples, device=wave.device)


def _token_owner(owner: Tensor, num_things: int) -> Tensor:
    step = FACTOR // _SAMPLES
    sampled = owner[..., step // 2 :: step, step // 2 :: step]  # [B, T, n, n]
    shares = torch.stack(
        [F.avg_pool2d((sampled == thing).float(), _SAMPLES) for thing in range(num_things)], -1
    )
    shares = shares.unflatten(1, (-1, 2)).mean(2).flatten(2, 3)  # [B, G, N, K]
    most, which = shares.max(-1)
    return torch.where(most > _OBJECT_SHARE, which, -1)


def _grid_action(pictures: ScenePlan, times: Tensor) -> Tensor:
    phase = (times - pictures.event_start[..., None]) / ACTION_S
    at_work = (phase > 0.08) & (phase < 0.92)
    at_work = at_work.unflatten(-1, (-1, 2)).any(-1)  # [B, E, G]
    things = torch.arange(pictures.radius.shape[1], device=times.device)
    mine = pictures.event_thing[..., None] == things  # [B, E, K]
    action = torch.where(at_work, pictures.event_action[..., None], -1)
    found = torch.where(mine[:, :, None], action[..., None], -1).amax(1)  # [B, G, K]
    return torch.where(found < 0, len(ACTIONS), found)
