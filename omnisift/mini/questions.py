"""Ask about a scene: questions of the six kinds of DailyOmni, and the caption.

Every question has one answer that follows from the facts of the scene; where a template has a
choice of answers it is made first, so that none is more frequent than it must be.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np

from omnisift.mini.world import NOISES, Event, Scene, Sound

Kind = Literal["alignment", "sequence", "comparative", "context", "inference", "counting"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_EMPTY = ("none", "nothing", "0")
CAPTION_PROMPTS = (
    "Describe the video.",
    "Describe what is seen and heard in this video in detail.",
    "What happens in the video?",
)


class Question(NamedTuple):
    """A question and its one right answer."""

    kind: Kind
    text: str
    answer: str


def caption(scene: Scene) -> str:
    """Return what is to be said: the poster, the ambience, the objects by name, what happens."""
    ambience = {"nothing": "silence", "noise": "noise", "music": "music"}[scene.ambience]
    things = sorted(
        f"{'large ' if thing.size == 'large' else ''}{thing.colour} {thing.shape}"
        for thing in scene.things
    )
    parts = [f"A {scene.pattern} poster and {ambience}.", f"Seen: {', '.join(things)}."]
    heard_with = {sound.event: sound for sound in scene.sounds if sound.event is not None}
    happenings: list[tuple[float, str]] = []
    for index, event in enumerate(scene.events):
        sound = heard_with.get(index)
        with_sound = f" with a {sound.noise}" if sound else ""
        happenings.append(
            (event.start_s, f"The {_colour(scene, event)} one {event.action}{with_sound}.")
        )
    happenings += [
        (sound.start_s, f"A {sound.noise} is heard.")
        for sound in scene.sounds
        if sound.event is None
    ]
    return " ".join([*parts, *(text for _, text in sorted(happenings))])


def caption_match(said: str, scene: Scene) -> tuple[int, int]:
    """Return how many of a caption's sentences were said, and how many there are."""
    told = Counter(said.rstrip(".").split(". "))
    true = Counter(caption(scene).rstrip(".").split(". "))
    return (told & true).total(), true.total()


def _colour(scene: Scene, event: Event) -> str:
    return scene.things[event.thing].colour


def _sound_of(scene: Scene, event: int) -> Sound | None:
    return next((sound for sound in scene.sounds if sound.event == event), None)


# A template yields every question it can ask of a scene.


def _who_acts_at(scene: Scene) -> Iterator[tuple[str, str]]:
    noises = Counter(sound.noise for sound in scene.sounds)
    for sound in scene.sounds:
        if sound.event is not None and noises[sound.noise] == 1:
            colour = _colour(scene, scene.events[sound.event])
            yield f"What colour is the object that acts when the {sound.noise} is heard?", colour


def _sound_at(scene: Scene) -> Iterator[tuple[str, str]]:
    acts = Counter((event.thing, event.action) for event in scene.events)
    for index, event in enumerate(scene.events):
        if acts[event.thing, event.action] == 1:
            sound = _sound_of(scene, index)
            text = f"What is heard when the {_colour(scene, event)} one {event.action}?"
            yield text, sound.noise if sound else "nothing"


def _act_at(scene: Scene) -> Iterator[tuple[str, str]]:
    noises = Counter(sound.noise for sound in scene.sounds)
    for sound in scene.sounds:
        if noises[sound.noise] == 1:
            happens = scene.events[sound.event].action if sound.event is not None else "nothing"
            yield f"What happens when the {sound.noise} is heard?", happens


def _first_or_last_actor(scene: Scene) -> Iterator[tuple[str, str]]:
    if scene.events:
        yield "What colour is the object that acts first?", _colour(scene, scene.events[0])
        yield "What colour is the object that acts last?", _colour(scene, scene.events[-1])


def _next_sound(scene: Scene) -> Iterator[tuple[str, str]]:
    noises = Counter(sound.noise for sound in scene.sounds)
    for sound, following in zip(scene.sounds, [*scene.sounds[1:], None], strict=False):
        if noises[sound.noise] == 1:
            answer = following.noise if following else "nothing"
            yield f"What is heard right after the {sound.noise}?", answer


def _next_actor(scene: Scene) -> Iterator[tuple[str, str]]:
    acts = Counter(event.thing for event in scene.events)
    for event, following in zip(scene.events, [*scene.events[1:], None], strict=False):
        if acts[event.thing] == 1:
            answer = _colour(scene, following) if following else "none"
            text = (
                f"What colour is the object that acts right after the {_colour(scene, event)} one?"
            )
            yield text, answer


def _turns(names: tuple[str, ...]) -> Iterator[str]:
    """Name alternatives beginning with each of them, so that their order says nothing."""
    for first in range(len(names)):
        turned = [*names[first:], *names[:first]]
        yield f"the {', the '.join(turned[:-1])} or the {turned[-1]}"


def _earliest_sound(scene: Scene) -> Iterator[tuple[str, str]]:
    noises = Counter(sound.noise for sound in scene.sounds)
    single = [sound.noise for sound in scene.sounds if noises[sound.noise] == 1]
    for some in combinations(single, 3 if len(single) > 2 else 2):
        for names in _turns(some):
            yield f"Which is heard first, {names}?", some[0]


def _sound_or_act_first(scene: Scene) -> Iterator[tuple[str, str]]:
    noises = Counter(sound.noise for sound in scene.sounds)
    acts = Counter(event.thing for event in scene.events)
    for sound in scene.sounds:
        for index, event in enumerate(scene.events):
            if noises[sound.noise] == 1 and acts[event.thing] == 1 and sound.event != index:
                colour = _colour(scene, event)
                text = f"What comes first, the {sound.noise} or the {colour} one acting?"
                yield text, sound.noise if sound.start_s < event.start_s else colour


def _largest(scene: Scene) -> Iterator[tuple[str, str]]:
    for some in combinations(scene.things, 3):
        large = [thing.colour for thing in some if thing.size == "large"]
        if len(large) == 1:
            for names in _turns(tuple(thing.colour for thing in some)):
                yield f"Which is the largest, {names} one?", large[0]


def _most_active(scene: Scene) -> Iterator[tuple[str, str]]:
    acts = Counter(event.thing for event in scene.events)
    for some in combinations(range(len(scene.things)), 3):
        ranked = sorted(some, key=lambda thing: -acts[thing])
        if acts[ranked[0]] > acts[ranked[1]]:
            for names in _turns(tuple(scene.things[thing].colour for thing in some)):
                yield f"Which acts most often, {names} one?", scene.things[ranked[0]].colour


def _ambience(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "What is heard in the background?", scene.ambience


def _pattern(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "What is the poster like?", scene.pattern


def _shape(scene: Scene) -> Iterator[tuple[str, str]]:
    for thing in scene.things:
        yield f"What shape is the {thing.colour} object?", thing.shape


def _sound_without_cause(scene: Scene) -> Iterator[tuple[str, str]]:
    unseen = [sound.noise for sound in scene.sounds if sound.event is None]
    if len(unseen) < 2:
        answer = unseen[0] if unseen else "none"
        yield "Which sound has no visible cause?", answer


def _silent_actor(scene: Scene) -> Iterator[tuple[str, str]]:
    silent = [
        _colour(scene, event)
        for index, event in enumerate(scene.events)
        if _sound_of(scene, index) is None
    ]
    if len(silent) < 2:
        yield (
            "What colour is the object that acts without a sound?",
            silent[0] if silent else "none",
        )


def _idle(scene: Scene) -> Iterator[tuple[str, str]]:
    actors = {event.thing for event in scene.events}
    idle = [thing.colour for index, thing in enumerate(scene.things) if index not in actors]
    if len(idle) == 1:
        yield "What colour is the object that never acts?", idle[0]


def _count_objects(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "How many objects are there?", str(len(scene.things))


def _count_noise(scene: Scene) -> Iterator[tuple[str, str]]:
    noises = Counter(sound.noise for sound in scene.sounds)
    for noise in NOISES:
        yield f"How many times is the {noise} heard?", str(noises[noise])


def _count_acts(scene: Scene) -> Iterator[tuple[str, str]]:
    acts = Counter(event.thing for event in scene.events)
    for index, thing in enumerate(scene.things):
        yield f"How many times does the {thing.colour} one act?", str(acts[index])


def _count_sounds(scene: Scene) -> Iterator[tuple[str, str]]:
    yield "How many sounds are heard?", str(len(scene.sounds))


Template = Callable[[Scene], Iterator[tuple[str, str]]]
TEMPLATES: dict[Kind, tuple[Template, ...]] = {
    "alignment": (_who_acts_at, _sound_at, _act_at),
    "sequence": (_first_or_last_actor, _next_sound, _next_actor),
    "comparative": (_earliest_sound, _sound_or_act_first, _largest, _most_active),
    "context": (_ambience, _pattern, _shape),
    "inference": (_sound_without_cause, _silent_actor, _idle),
    "counting": (_count_objects, _count_noise, _count_acts, _count_sounds),
}


def ask(scene: Scene, chance: np.random.Generator, kind: Kind) -> Question | None:
    """Draw a question of a kind; None where the scene has nothing to ask it about."""
    for index in chance.permutation(len(TEMPLATES[kind])):
        asked = list(TEMPLATES[kind][index](scene))
        # "None" is a frequent answer: it is asked for now and then, or guessing it would pay.
        told = [entry for entry in asked if entry[1] not in _EMPTY or chance.random() < 0.25]
        if told:
            answers = sorted({answer for _, answer in told})
            wanted = answers[int(chance.integers(len(answers)))]
            fitting = [entry for entry in told if entry[1] == wanted]
            text, answer = fitting[int(chance.integers(len(fitting)))]
            return Question(kind, text, answer)
    return None


def draw_questions(scene: Scene, seed: int, number: int) -> list[Question]:
    """Draw `number` questions, the kinds in turn from a random one on; repeatable from the seed."""
    chance = np.random.default_rng([seed, scene.texture_seed])
    questions: list[Question] = []
    turn = int(chance.integers(len(KINDS)))
    while len(questions) < number:
        question = ask(scene, chance, KINDS[turn % len(KINDS)])
        turn += 1
        if question is not None:
            questions.append(question)
    return questions
