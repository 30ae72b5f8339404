import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from omnisift.mini.pictures import MAX_EVENTS, MAX_THINGS
from omnisift.mini.questions import KINDS, Question, caption, draw_questions
from omnisift.mini.sounds import MAX_SOUNDS
from omnisift.mini.world import ACTION_S, DURATIONS, Scene, draw_scene

SEED = 4


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(SEED, index) for index in range(1500)]


@pytest.fixture(scope="module")
def asked(scenes: list[Scene]) -> list[list[Question]]:
    return [draw_questions(scene, 0, 8) for scene in scenes]


def test_a_scene_is_its_seed_and_number(scenes: list[Scene]) -> None:
    assert scenes[7] == draw_scene(SEED, 7)
    assert scenes[7] != scenes[8]
    assert scenes[7] != draw_scene(SEED + 1, 7)
    assert {scene.duration_s for scene in scenes} == set(DURATIONS)


def test_scenes_fit_their_plans_and_happenings_do_not_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 3 <= len(scene.things) <= MAX_THINGS
        assert len(scene.events) <= MAX_EVENTS
        assert len(scene.sounds) <= MAX_SOUNDS
        assert len({thing.colour for thing in scene.things}) == len(scene.things)
        starts = [event.start_s for event in scene.events]
        assert all(later - earlier >= ACTION_S for earlier, later in pairwise(starts))
        assert all(start >= 0 and start + ACTION_S <= scene.duration_s for start in starts)
        for sound in scene.sounds:
            assert sound.start_s + sound.duration_s < scene.duration_s
            if sound.event is not None:
                event = scene.events[sound.event]
                assert event.start_s <= sound.start_s < event.start_s + ACTION_S


def facts(scene: Scene) -> list[tuple[float, str, str, str]]:
    """What happens, told anew: (when, colour, action, noise), "" for what there is not."""
    told: list[tuple[float, str, str, str]] = []
    for event in scene.events:
        inside = [
            sound.noise
            for sound in scene.sounds
            if event.start_s <= sound.start_s < event.start_s + ACTION_S
        ]
        colour = scene.things[event.thing].colour
        told.append((event.start_s, colour, event.action, inside[0] if inside else ""))
    told.extend(
        (sound.start_s, "", "", sound.noise)
        for sound in scene.sounds
        if not any(e.start_s <= sound.start_s < e.start_s + ACTION_S for e in scene.events)
    )
    return sorted(told)


class Told:
    """A scene as a listener would note it, and what follows from the notes."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.facts = facts(scene)
        self.colours = {str(thing.colour): thing for thing in scene.things}
        self.acting = [colour for _, colour, _, _ in self.facts if colour]
        self.sounding = [noise for *_, noise in self.facts if noise]
        self.acts, self.heard = Counter(self.acting), Counter(self.sounding)

    def first(self, names: list[str]) -> set[str]:
        order = [{colour, noise} for _, colour, _, noise in self.facts]
        return {min(names, key=lambda name: [name in pair for pair in order].index(True))}


def behind(order: list[str], name: str, end: str) -> set[str]:
    return {[*order, end][order.index(name) + 1]}


Rule = Callable[..., set[str]]
RULES: dict[str, Rule] = {
    r"What colour is the object that acts when the (\w+) is heard\?": lambda t, noise: {
        colour for _, colour, _, n in t.facts if n == noise
    },
    r"What is heard when the (\w+) one (\w+)\?": lambda t, *did: {
        noise or "nothing" for _, colour, act, noise in t.facts if (colour, act) == did
    },
    r"What happens when the (\w+) is heard\?": lambda t, noise: {
        act or "nothing" for _, _, act, n in t.facts if n == noise
    },
    r"What colour is the object that acts first\?": lambda t: {t.acting[0]},
    r"What colour is the object that acts last\?": lambda t: {t.acting[-1]},
    r"What is heard right after the (\w+)\?": lambda t, noise: behind(t.sounding, noise, "nothing"),
    r"What colour .* acts right after the (\w+) one\?": lambda t, colour: behind(
        t.acting, colour, "none"
    ),
    r"Which is heard first, (.*)\?": lambda t, names: t.first(re.findall(r"the (\w+)", names)),
    r"What comes first, the (\w+) or the (\w+) one acting\?": lambda t, *names: t.first(
        list(names)
    ),
    r"Which is the largest, (.*) one\?": lambda t, names: {
        max(re.findall(r"the (\w+)", names), key=lambda colour: t.colours[colour].radius)
    },
    r"Which acts most often, (.*) one\?": lambda t, names: {
        max(re.findall(r"the (\w+)", names), key=lambda colour: t.acts[colour])
    },
    r"Which sound has no visible cause\?": lambda t: (
        {noise for _, colour, _, noise in t.facts if not colour} or {"none"}
    ),
    r"What colour is the object that acts without a sound\?": lambda t: (
        {colour for _, colour, _, noise in t.facts if colour and not noise} or {"none"}
    ),
    r"What colour is the object that never acts\?": lambda t: set(t.colours) - set(t.acts),
    r"How many times is the (\w+) heard\?": lambda t, noise: {str(t.heard[noise])},
    r"How many times does the (\w+) one act\?": lambda t, colour: {str(t.acts[colour])},
    r"How many sounds are heard\?": lambda t: {str(t.heard.total())},
    r"How many objects are there\?": lambda t: {str(len(t.colours))},
    r"What shape is the (\w+) object\?": lambda t, colour: {t.colours[colour].shape},
    r"What is the poster like\?": lambda t: {t.scene.pattern},
    r"What is heard in the background\?": lambda t: {t.scene.ambience},
}


def answer(scene: Scene, text: str) -> set[str]:
    """Answer a question from the notes alone."""
    [(rule, found)] = [
        (rule, found) for form, rule in RULES.items() if (found := re.fullmatch(form, text))
    ]
    return rule(Told(scene), *found.groups())


def test_every_answer_is_the_only_one_the_happenings_allow(
    scenes: list[Scene], asked: list[list[Question]]
) -> None:
    for scene, questions in zip(scenes, asked, strict=True):
        for question in questions:
            assert answer(scene, question.text) == {question.answer}, (scene, question)


def test_questions_repeat_and_cover_the_kinds(
    scenes: list[Scene], asked: list[list[Question]]
) -> None:
    assert draw_questions(scenes[3], 0, 8) == asked[3]
    kinds = Counter(question.kind for questions in asked for question in questions)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.1 * kinds.total()


def test_a_model_that_sees_only_the_question_scores_low(asked: list[list[Question]]) -> None:
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for questions in asked[:1000]:
        for question in questions:
            known[question.text][question.answer] += 1
    held_out = [question for questions in asked[1000:] for question in questions]
    guesses = [
        known[question.text].most_common(1)[0][0] if question.text in known else ""
        for question in held_out
    ]
    right = np.mean([guess == q.answer for guess, q in zip(guesses, held_out, strict=True)])
    assert right <= 0.35


def test_a_caption_tells_what_happens_in_its_order(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        text = caption(scene)
        told = re.findall(
            r"The (\w+) one (\w+)(?: with a (\w+))?\.|A (\w+) is heard\.",
            text.partition(". ")[2].partition(". ")[2],
        )
        expected = [(colour, act, noise) for _, colour, act, noise in facts(scene)]
        assert [(colour, act, noise or alone) for colour, act, noise, alone in told] == expected
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in text
