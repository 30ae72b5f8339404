"""A synthetic audio-visual world: seeded scenes in which objects act and sounds are heard.

A scene is a list of facts; `pictures` draws it, `sounds` makes it heard, `questions` asks about it.
Lengths are in pixels of a frame of `SIDE` x `SIDE`, times in seconds.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from omnisift.mini import words

SIDE = 224
DURATIONS = (6, 8, 10, 12, 16, 20)

Colour = Literal["red", "green", "blue", "yellow", "pink", "cyan", "orange", "white"]
Shape = Literal["circle", "square", "triangle", "ring", "cross"]
Size = Literal["small", "large"]
Action = Literal["flashes", "grows", "jumps", "vanishes", "collides", "appears"]
Noise = Literal["bell", "whistle", "drum", "buzzer", "chirp", "horn", "click", "beep", words.Word]
Pattern = Literal["plain", "striped", "dotted", "checked"]
Ambience = Literal["nothing", "noise", "music"]

COLOURS: tuple[Colour, ...] = get_args(Colour)
SHAPES: tuple[Shape, ...] = get_args(Shape)
ACTIONS: tuple[Action, ...] = get_args(Action)
NOISES: tuple[Noise, ...] = get_args(Noise)  # Literal flattens what is in it
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
AMBIENCES: tuple[Ambience, ...] = get_args(Ambience)

ACTION_S = 1.0  # so that at 2 frames a second two frames show it
_SLOT_S = 1.3  # from one happening to the next: none can be taken for another
_CELLS = 3  # a home for an object every SIDE / 3


@dataclass(frozen=True)
class Thing:
    """An object: it stays at home, or sways around it."""

    colour: Colour
    shape: Shape
    size: Size
    radius: float
    home: tuple[float, float]  # x, y
    sway: tuple[float, float]  # amplitudes; (0, 0): it stands still
    sway_s: float  # period


@dataclass(frozen=True)
class Event:
    """What an object does, and what is heard with it."""

    thing: int
    action: Action
    start_s: float
    towards: int  # whom it collides with; itself otherwise


@dataclass(frozen=True)
class Sound:
    """A short sound or a spoken word.

    `event` is the event it belongs to, None for one without a visible cause; `voice` says a word.
    """

    noise: Noise
    start_s: float
    duration_s: float
    pitch: float  # factor
    loudness: float  # peak amplitude
    event: int | None
    voice: int = 0


@dataclass(frozen=True)
class Scene:
    """All facts of one clip, and the seed of what carries none (texture, notes, jitter)."""

    duration_s: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]  # in the order of time
    sounds: tuple[Sound, ...]  # in the order of time
    pattern: Pattern  # of the poster
    poster: tuple[float, float]  # its centre; it hangs there all the time
    ambience: Ambience
    texture_seed: int


def draw_scene(seed: int, index: int, duration_s: int | None = None) -> Scene:
    """Draw scene number `index` of the world `seed`; the same arguments give the same scene."""
    chance = np.random.default_rng([seed, index])
    if duration_s is None:
        duration_s = int(chance.choice(DURATIONS))
    *homes, poster = _draw_homes(chance)
    things = _draw_things(chance, homes)
    starts = _draw_starts(chance, duration_s)
    events: list[Event] = []
    sounds: list[Sound] = []
    # Few sounds and few actors a scene, so that counting has something to count.
    noises = chance.choice(len(NOISES), size=int(chance.integers(3, 6)), replace=False)
    actors = chance.permutation(len(things))[: max(2, len(things) - 1)]
    for start_s in starts:
        what = chance.random()
        acts, sounds_too = what < 0.7, what < 0.48 or 0.7 <= what < 0.9
        if acts:
            thing = int(chance.choice(actors))
            events.append(_draw_event(chance, thing, start_s, things, events))
        if sounds_too:
            noise = NOISES[int(chance.choice(noises))]
            sounds.append(_draw_sound(chance, noise, start_s, len(events) - 1 if acts else None))
    return Scene(
        duration_s=duration_s,
        things=things,
        events=tuple(events),
        sounds=tuple(sounds),
        pattern=PATTERNS[int(chance.integers(len(PATTERNS)))],
        poster=poster,
        ambience=AMBIENCES[int(chance.integers(len(AMBIENCES)))],
        texture_seed=int(chance.integers(2**31)),
    )


def _draw_homes(chance: np.random.Generator) -> list[tuple[float, float]]:
    """Draw a place, x and y, for each object and one for the poster."""
    number = int(chance.integers(3, 6)) + 1
    cells = chance.choice(_CELLS**2, size=number, replace=False)
    corners = np.stack(np.divmod(cells, _CELLS), axis=1)
    places = (corners + 0.5) * SIDE / _CELLS + chance.uniform(-6, 6, (number, 2))
    return [(x, y) for x, y in places.tolist()]


def _draw_things(
    chance: np.random.Generator, homes: list[tuple[float, float]]
) -> tuple[Thing, ...]:
    colours = chance.choice(len(COLOURS), size=len(homes), replace=False)
    things = []
    for colour, home in zip(colours, homes, strict=True):
        large = bool(chance.random() < 0.5)
        moves = bool(chance.random() < 0.5)
        sway = chance.uniform(4, 10, 2) * chance.choice([-1, 1], 2) if moves else np.zeros(2)
        things.append(
            Thing(
                colour=COLOURS[int(colour)],
                shape=SHAPES[int(chance.integers(len(SHAPES)))],
                size="large" if large else "small",
                radius=float(chance.uniform(20, 23) if large else chance.uniform(12, 14)),
                home=home,
                sway=(float(sway[0]), float(sway[1])),
                sway_s=float(chance.uniform(3, 6)),
            )
        )
    return tuple(things)


def _draw_starts(chance: np.random.Generator, duration_s: int) -> list[float]:
    slots = int((duration_s - 0.4) / _SLOT_S)
    # Long clips are mostly quiet, as long videos are.
    wanted = min(slots, int(chance.integers(3, 9)))
    chosen = np.sort(chance.choice(slots, size=wanted, replace=False))
    slack = (duration_s - 0.4) - slots * _SLOT_S
    shift = chance.uniform(0, slack) if slack > 0 else 0.0
    starts: list[float] = (0.2 + shift + chosen * _SLOT_S + chance.uniform(0, 0.1, wanted)).tolist()
    return starts


def _draw_sound(
    chance: np.random.Generator, noise: Noise, start_s: float, event: int | None
) -> Sound:
    pitch = float(chance.uniform(0.92, 1.08))
    duration_s, voice = float(chance.uniform(0.09, 0.18)), 0
    if noise in words.WORDS:
        voice = int(chance.integers(len(words.VOICES)))
        duration_s = float(words.seconds()[words.WORDS.index(noise), voice]) / pitch
    return Sound(
        noise=noise,
        start_s=start_s + float(chance.uniform(0.05, 0.35)),
        duration_s=duration_s,
        pitch=pitch,
        loudness=float(chance.uniform(0.15, 0.5)),
        event=event,
        voice=voice,
    )


def _draw_event(
    chance: np.random.Generator,
    thing: int,
    start_s: float,
    things: tuple[Thing, ...],
    events: list[Event],
) -> Event:
    fresh = all(thing not in (event.thing, event.towards) for event in events)
    # Only what has not been seen yet can appear, and not so early that nobody saw it missing.
    number = len(ACTIONS) if fresh and start_s > 1.2 else len(ACTIONS) - 1
    action = ACTIONS[int(chance.integers(number))]
    towards = thing
    if action == "collides":
        homes = np.array([other.home for other in things])
        distance = np.linalg.norm(homes - homes[thing], axis=1)
        distance[thing] = np.inf
        towards = int(distance.argmin())
    return Event(thing, action, start_s, towards)
