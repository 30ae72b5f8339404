"""Draw scenes: frames of many scenes at once, on whatever device, and what each token shows.

Shapes: B scenes, T frames, K objects, E events, H = W = side.
"""

from collections.abc import Sequence
from math import tau
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnisift.mini.fused import fused
from omnisift.mini.world import ACTION_S, ACTIONS, COLOURS, PATTERNS, SHAPES, SIDE, Scene

MAX_THINGS = 5
MAX_EVENTS = 8
_RGB = {
    "red": (215, 35, 35),
    "green": (30, 170, 50),
    "blue": (45, 70, 230),
    "yellow": (235, 220, 40),
    "pink": (240, 90, 200),
    "cyan": (50, 210, 220),
    "orange": (245, 135, 25),
    "white": (240, 240, 240),
}
_NUM_WAVES = 4  # of the texture
_POSTER = 24.0  # pixels from its centre to an edge
_NEVER = 1e6


class ScenePlan(NamedTuple):
    """What is drawn, as tensors; padded with objects of radius 0 and events that never are."""

    colour: Tensor  # [B, K] index in COLOURS
    shape: Tensor  # [B, K] index in SHAPES
    radius: Tensor  # [B, K]
    home: Tensor  # [B, K, 2]
    sway: Tensor  # [B, K, 2]
    sway_s: Tensor  # [B, K]
    event_thing: Tensor  # [B, E]
    event_action: Tensor  # [B, E] index in ACTIONS
    event_start: Tensor  # [B, E]
    event_move: Tensor  # [B, E, 2] where it goes at the height of the action
    ground: Tensor  # [B, 3]
    pattern: Tensor  # [B] index in PATTERNS
    pattern_wave: Tensor  # [B, 3]: period, angle, phase
    poster: Tensor  # [B, 3]: x and y of its centre, its shade over the ground
    texture: Tensor  # [B, waves, 4]: kx, ky, phase, amplitude
    jitter: Tensor  # [B, 2, 3]: amplitude, period, phase for x and y
    drift: Tensor  # [B, 3]: amplitude, period, phase of the brightness


def plan_pictures(scenes: Sequence[Scene]) -> ScenePlan:
    """Gather the scenes' facts, and what their seeds say of texture, jitter and brightness."""
    rows = [_row(scene) for scene in scenes]
    return ScenePlan(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _row(scene: Scene) -> list[np.ndarray]:
    chance = np.random.default_rng(scene.texture_seed)
    things, events = scene.things, scene.events

    def column(values: list[object], size: int, fill: object, kind: type) -> np.ndarray:
        return np.array(values + [fill] * (size - len(values)), dtype=kind)

    moves: list[object] = []
    for event in events:
        thing, other = things[event.thing], things[event.towards]
        move = (0.0, 0.0)
        if event.action == "jumps":
            move = (0.0, -0.13 * SIDE)
        elif event.action == "collides":
            way = np.subtract(other.home, thing.home)
            length = float(np.linalg.norm(way))
            reach = max(0.0, length - 0.9 * (thing.radius + other.radius)) / max(length, 1.0)
            move = (float(way[0] * reach), float(way[1] * reach))
        moves.append(move)
    f4, i8 = np.float32, np.int64
    jitter = chance.random() < 0.5
    return [
        column([COLOURS.index(thing.colour) for thing in things], MAX_THINGS, 0, i8),
        column([SHAPES.index(thing.shape) for thing in things], MAX_THINGS, 0, i8),
        column([thing.radius for thing in things], MAX_THINGS, 0.0, f4),
        column([thing.home for thing in things], MAX_THINGS, (0.0, 0.0), f4),
        column([thing.sway for thing in things], MAX_THINGS, (0.0, 0.0), f4),
        column([thing.sway_s for thing in things], MAX_THINGS, 1.0, f4),
        column([event.thing for event in events], MAX_EVENTS, 0, i8),
        column([ACTIONS.index(event.action) for event in events], MAX_EVENTS, 0, i8),
        column([event.start_s for event in events], MAX_EVENTS, _NEVER, f4),
        column(moves, MAX_EVENTS, (0.0, 0.0), f4),
        chance.uniform(0.22, 0.5, 3).astype(f4),
        np.array(PATTERNS.index(scene.pattern), dtype=i8),
        np.array(
            [chance.uniform(12, 18), chance.uniform(0, tau), chance.uniform(0, tau)], dtype=f4
        ),
        np.array([*scene.poster, chance.uniform(0.15, 0.25)], dtype=f4),
        np.stack(
            [
                *chance.uniform(-tau / 40, tau / 40, (2, _NUM_WAVES)),
                chance.uniform(0, tau, _NUM_WAVES),
                chance.uniform(0.005, 0.02, _NUM_WAVES),
            ],
            axis=1,
        ).astype(f4),
        np.array(
            [[jitter * chance.uniform(0.3, 1.2), chance.uniform(0.7, 3), chance.uniform(0, tau)]]
            * 2,
            dtype=f4,
        ),
        np.array(
            [chance.uniform(0, 0.06), chance.uniform(6, 30), chance.uniform(0, tau)], dtype=f4
        ),
    ]


def draw(plan: ScenePlan, times: Tensor, *, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Draw the scenes at `times` [T] seconds.

    Returns the frames, float in [0, 1], [B, T, 3, H, W], and which object each pixel shows,
    int8 [B, T, H, W] (-1: none). A pixel of an object that flashes counts as its.
    """
    batch, num = len(plan.radius), len(times)
    axis = (torch.arange(side, device=times.device) + 0.5) * (SIDE / side)
    jitter = plan.jitter[:, :, :, None]
    wave = jitter[:, :, 0] * torch.sin(tau * times / jitter[:, :, 1] + jitter[:, :, 2])  # [B, 2, T]
    # From here on a row is a frame: as many of them in short clips as in fewer long ones.
    x, y = ((axis + wave[:, side_of, :, None]).flatten(0, 1) for side_of in (0, 1))  # [B T, side]

    def of_frames(value: Tensor) -> Tensor:
        return value.repeat_interleave(num, dim=0)

    frames = _ground(
        x,
        y,
        *(
            of_frames(value)
            for value in (plan.ground, plan.pattern, plan.pattern_wave, plan.poster, plan.texture)
        ),
    )
    owner = torch.full((batch * num, side, side), -1, dtype=torch.int8, device=times.device)
    poses = _poses(plan, times)
    colours = torch.tensor([_RGB[name] for name in COLOURS], device=times.device) / 255
    for thing in range(plan.radius.shape[1]):
        shape, radius, paint = (
            of_frames(value)
            for value in (
                plan.shape[:, thing],
                plan.radius[:, thing],
                colours[plan.colour[:, thing]],
            )
        )
        pose = torch.stack([value[:, thing].flatten() for value in poses])
        number = torch.full((1,), thing, dtype=torch.int8, device=times.device)
        frames, owner = _add_thing(frames, owner, x, y, shape, radius, paint, pose, number)
    drift = plan.drift[:, :, None]
    light = 1 + drift[:, 0] * torch.sin(tau * times / drift[:, 1] + drift[:, 2])
    frames = (frames * light.flatten()[:, None, None, None]).clamp(0, 1)
    return frames.unflatten(0, (batch, num)), owner.unflatten(0, (batch, num))


@fused
def _ground(
    x: Tensor,
    y: Tensor,
    ground: Tensor,
    pattern: Tensor,
    pattern_wave: Tensor,
    poster: Tensor,
    waves: Tensor,
) -> Tensor:
    """Return the background with its poster, [F, 3, H, W] of F frames."""
    across, down = x[:, None, :], y[:, :, None]
    period, angle, phase = pattern_wave[:, :, None, None].unbind(1)
    k = tau / period
    along = k * (angle.cos() * across + angle.sin() * down) + phase
    stripes = along.sin().sign()
    dots = ((k * across).sin() * (k * down).sin() > 0.35).float() * 2 - 0.6
    checks = ((k * 0.7 * across).sin() * (k * 0.7 * down).sin()).sign()
    kind = pattern[:, None, None]
    figure = torch.where(kind == PATTERNS.index("striped"), stripes, torch.zeros_like(stripes))
    figure = torch.where(kind == PATTERNS.index("dotted"), dots, figure)
    figure = torch.where(kind == PATTERNS.index("checked"), checks, figure)
    texture = torch.zeros_like(figure)
    for wave in waves[..., None, None].unbind(1):
        kx, ky, shift, amplitude = wave.unbind(1)
        texture = texture + amplitude * (kx * across + ky * down + shift).sin()
    left, top, shade = poster[:, :, None, None].unbind(1)
    outside = torch.maximum((across - left).abs(), (down - top).abs()) - _POSTER
    on_it = (0.5 - outside).clamp(0, 1)
    return ground[:, :, None, None] + (on_it * (shade + 0.2 * figure) + texture)[:, None]


class _Poses(NamedTuple):
    x: Tensor  # [B, K, T]
    y: Tensor
    scale: Tensor
    visible: Tensor
    glow: Tensor


def _poses(plan: ScenePlan, times: Tensor) -> _Poses:
    phase = (times - plan.event_start[:, :, None]) / ACTION_S  # [B, E, T]
    # Up, held for half of the time, down again.
    height = (4 * torch.minimum(phase, 1 - phase)).clamp(0, 1)
    things = torch.arange(plan.radius.shape[1], device=times.device)
    mine = (plan.event_thing[:, :, None] == things).float()  # [B, E, K]
    strength = {
        action: height * (plan.event_action == index)[:, :, None]
        for index, action in enumerate(ACTIONS)
    }

    def of_things(value_BET: Tensor) -> Tensor:
        return torch.einsum("bet,bek->bkt", value_BET, mine)

    moved = strength["jumps"] + strength["collides"]
    shift = [of_things(moved * plan.event_move[:, :, None, i]) for i in (0, 1)]
    missing = ((phase < 0) & (plan.event_action == ACTIONS.index("appears"))[:, :, None]).float()
    missing = missing * (plan.event_start < _NEVER)[:, :, None]
    angle = torch.sin(tau * times / plan.sway_s[:, :, None])
    return _Poses(
        x=plan.home[:, :, None, 0] + plan.sway[:, :, None, 0] * angle + shift[0],
        y=plan.home[:, :, None, 1] + plan.sway[:, :, None, 1] * angle + shift[1],
        scale=1 + 0.55 * of_things(strength["grows"]),
        visible=(1 - of_things(strength["vanishes"]) - of_things(missing)).clamp(0, 1),
        glow=of_things(strength["flashes"]),
    )


@fused
def _add_thing(
    frames: Tensor,
    owner: Tensor,
    x: Tensor,
    y: Tensor,
    shape: Tensor,
    radius: Tensor,
    paint: Tensor,
    pose: Tensor,
    number: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw object `number` of each frame; return the frames and who is seen where.

    Its shape and radius [F] (0: there is none), its colour [F, 3], its pose [5, F] (`_Poses`).
    """
    at_x, at_y, scale, visible, glow = pose[:, :, None, None].unbind()
    there = (radius > 0)[:, None, None] * visible
    size = radius[:, None, None] * scale
    dx = x[:, None, :] - at_x
    dy = y[:, :, None] - at_y
    alpha = (0.5 - _edge(shape[:, None, None], dx, dy, size)).clamp(0, 1) * there
    # A flash: a white halo round a darkened object.
    away = (dx**2 + dy**2).sqrt()
    halo = (1 - ((away - 1.25 * size).abs() / 5)).clamp(0, 1) * glow * there
    colour = paint[:, :, None, None] * (1 - 0.55 * glow[:, None])
    frames = frames + halo[:, None] * (1 - frames)
    frames = frames + alpha[:, None] * (colour - frames)
    return frames, torch.where((alpha > 0.5) | (halo > 0.5), number, owner)


def _edge(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Return the signed distance to the outline, negative inside."""
    ax, ay = dx.abs(), dy.abs()
    away = (dx**2 + dy**2).sqrt()
    bar = torch.maximum(ax - radius, ay - 0.33 * radius)
    post = torch.maximum(ax - 0.33 * radius, ay - radius)
    outlines = {
        "circle": away - radius,
        "square": torch.maximum(ax, ay) - 0.88 * radius,
        "triangle": torch.maximum(0.866 * ax + 0.5 * dy, -dy) - 0.55 * radius - 0.1 * dy,
        "ring": (away - 0.75 * radius).abs() - 0.25 * radius,
        "cross": torch.minimum(bar, post),
    }
    edge = outlines["circle"]
    for index, name in enumerate(SHAPES):
        edge = torch.where(shape == index, outlines[name], edge)
    return edge
