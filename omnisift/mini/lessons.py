"""Batches to train on: scenes of one length with their questions behind one shared video.

A sample is the prompt of `Answerer`: system turn, block, then several questions and a caption
side by side, each of which sees the video and itself alone. Drawing scenes is host work, done by
the workers of a DataLoader; pictures and sounds are made from it on the GPU.

Shapes: B scenes, Q questions, S tokens of all slots.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from omnisift.mini.pictures import ScenePlan, plan_pictures
from omnisift.mini.questions import CAPTION_PROMPTS, KINDS, Question, caption, draw_questions
from omnisift.mini.sounds import AAC_FRAME, SoundPlan, plan_sounds
from omnisift.mini.world import Scene, draw_scene
from omnisift.prompts import PromptText

IGNORED = -100
# Lengths a batch may have, and how often. The world has all of them alike, but a batch has as
# many seconds of video whatever their length, and so fewer scenes to learn from of long ones.
_LENGTHS = {6: 0.2, 8: 0.2, 10: 0.2, 12: 0.2, 16: 0.1, 20: 0.1}


class Lesson(NamedTuple):
    """A batch."""

    duration_s: int
    tail_samples: int  # that the sound goes on behind the scenes' end, as a codec leaves it
    pictures: ScenePlan
    sounds: SoundPlan
    ids: Tensor  # [B, S] questions and answers
    targets: Tensor  # [B, S] the next token where it belongs to an answer, else IGNORED
    kinds: Tensor  # [B, S] index in KINDS; len(KINDS) for the caption
    sound_event: Tensor  # [B, sounds] index of the event it belongs to, -1 for none
    keys: list[str]  # the scenes' names, which seed what a method leaves to chance

    def plans(self, device: torch.device) -> tuple[ScenePlan, SoundPlan]:
        """Return what is drawn and what is heard, on a device."""
        pictures = (value.to(device, non_blocking=True) for value in self.pictures)
        sounds = (value.to(device, non_blocking=True) for value in self.sounds)
        return ScenePlan(*pictures), SoundPlan(*sounds)


class Slots(NamedTuple):
    """How many tokens the questions and the caption of a sample may take."""

    questions: int = 8
    question_tokens: int = 24
    caption_tokens: int = 112

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each slot."""
        return [self.question_tokens] * self.questions + [self.caption_tokens]


class Lessons(Dataset[Lesson]):
    """Lesson number i of a seed: the same scenes and questions whenever it is asked for."""

    def __init__(
        self, text: PromptText, *, seed: int, steps: int, grids: int, slots: Slots | None = None
    ) -> None:
        """Take about `grids` seconds of video a lesson; `steps` lessons."""
        self.text, self.seed, self.steps, self.grids = text, seed, steps, grids
        self.slots = slots or Slots()
        self._turn = lru_cache(maxsize=50_000)(self._encode_turn)

    def __len__(self) -> int:
        """Return the number of lessons."""
        return self.steps

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache of turns behind; each worker has its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take a copy in another process."""
        self.__dict__.update(state)
        self._turn = lru_cache(maxsize=50_000)(self._encode_turn)

    def _encode_turn(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return a question and its answer, and how many of the tokens ask."""
        asked = self.text.after_video(question)
        return [*asked, *self.text.choice(answer)], len(asked)

    def __getitem__(self, step: int) -> Lesson:
        """Draw lesson number `step`."""
        chance = np.random.default_rng([self.seed, step])
        duration_s = int(chance.choice(list(_LENGTHS), p=list(_LENGTHS.values())))
        number = max(1, self.grids // duration_s)
        first = step * self.grids  # no scene twice: a lesson has fewer than `grids`
        scenes = [draw_scene(self.seed, first + row, duration_s) for row in range(number)]
        rows = [self._row(scene, chance) for scene in scenes]
        ids, targets, kinds = (
            torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)
        )
        sounds = plan_sounds(scenes)
        events = torch.full(sounds.noise.shape, -1, dtype=torch.long)
        for row, scene in enumerate(scenes):
            for index, sound in enumerate(scene.sounds):
                events[row, index] = -1 if sound.event is None else sound.event
        keys = [f"{self.seed}/{first + row}" for row in range(number)]
        # Files whose sound is no multiple of AAC's frames decode to more than the scene.
        tail_samples = int(chance.integers(1, AAC_FRAME)) if chance.random() < 0.5 else 0
        pictures = plan_pictures(scenes)
        return Lesson(duration_s, tail_samples, pictures, sounds, ids, targets, kinds, events, keys)

    def _row(self, scene: Scene, chance: np.random.Generator) -> list[np.ndarray[Any, Any]]:
        lengths = self.slots.lengths
        asked: list[tuple[Question | None, str, str]] = [
            (question, question.text, question.answer)
            for question in draw_questions(scene, self.seed, self.slots.questions)
        ]
        prompt = CAPTION_PROMPTS[int(chance.integers(len(CAPTION_PROMPTS)))]
        asked.append((None, prompt, caption(scene)))
        ids = np.zeros(sum(lengths), dtype=np.int64)
        targets = np.full(sum(lengths), IGNORED, dtype=np.int64)
        kinds = np.full(sum(lengths), len(KINDS), dtype=np.int64)
        start = 0
        for (question, text, answer), length in zip(asked, lengths, strict=True):
            tokens, num_asked = self._turn(text, answer)
            tokens = tokens[:length]
            ids[start : start + len(tokens)] = tokens
            targets[start + num_asked - 1 : start + len(tokens) - 1] = tokens[num_asked:]
            if question is not None:
                kinds[start : start + length] = KINDS.index(question.kind)
            start += length
        return [ids, targets, kinds]
