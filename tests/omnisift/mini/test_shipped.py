from pathlib import Path

import pytest

from omnisift.answer import Answerer
from omnisift.backbone import Backbone
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compressor import Clip, KeptTokens, VideoCompressor
from omnisift.mini.layouts import shares_for
from omnisift.mini.questions import CAPTION_PROMPTS, caption_match, draw_questions
from omnisift.mini.shipped import FOLDER, HELD_OUT_SEED
from omnisift.mini.world import Scene, draw_scene
from pipeline.config import AnswerConfig
from pipeline.testing.scene_clips import decode_scene

SCENES = [draw_scene(HELD_OUT_SEED, number, 6) for number in range(4)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(FOLDER)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [decode_scene(scene) for scene in SCENES]


def keep(backbone: Backbone, clips: list[Clip], retain: float | None) -> list[KeptTokens]:
    selector = build_selector(read_selector(FOLDER), backbone.width)
    shares = shares_for(1.0 if retain is None else retain)
    method = "none" if retain is None else "omnisift"
    return VideoCompressor(backbone, selector, shares, method=method)(clips)


def answers(backbone: Backbone, kept: list[KeptTokens], asked: list[list[str]]) -> list[list[str]]:
    answerer = Answerer(
        backbone,
        load_tokenizer(FOLDER),
        system_prompt=AnswerConfig().system_prompt,
        max_new_tokens=112,
    )
    given = []
    for tokens, questions in zip(kept, asked, strict=True):
        context = answerer.open(tokens)
        given.append([a.text for a in answerer([answerer.ask(context, q) for q in questions])])
    return given


def true_sentences(scenes: list[Scene], said: list[list[str]]) -> float:
    matches = [caption_match(text, scene) for scene, [text] in zip(scenes, said, strict=True)]
    return sum(right for right, _ in matches) / sum(total for _, total in matches)


def test_it_is_small_and_its_selector_is_trained(backbone: Backbone) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 32 << 20
    assert sum(parameter.numel() for parameter in backbone.model.parameters()) <= 16e6
    assert read_selector(FOLDER).trained
    assert (Path(FOLDER) / "README.md").is_file()


@pytest.mark.parametrize(("retain", "share"), [(None, 0.6), (0.25, 0.5)])
def test_captions_of_scenes_it_never_saw_are_mostly_true(
    backbone: Backbone, clips: list[Clip], retain: float | None, share: float
) -> None:
    kept = keep(backbone, clips, retain)
    if retain is not None:
        before = sum(k.num_video_tokens + k.num_audio_tokens for k in kept)
        after = sum(k.kept_video_tokens + k.kept_audio_tokens for k in kept)
        assert after / before == pytest.approx(retain, abs=0.02)
    said = answers(backbone, kept, [[CAPTION_PROMPTS[0]]] * len(kept))
    assert true_sentences(SCENES, said) >= share
    # Of another scene the same captions say little that is true.
    assert true_sentences([*SCENES[1:], SCENES[0]], said) < share / 2


def test_it_answers_questions_about_scenes_it_never_saw(
    backbone: Backbone, clips: list[Clip]
) -> None:
    asked = [draw_questions(scene, 0, 6) for scene in SCENES]
    given = answers(
        backbone, keep(backbone, clips, None), [[q.text for q in some] for some in asked]
    )
    right = [
        text == question.answer
        for texts, some in zip(given, asked, strict=True)
        for text, question in zip(texts, some, strict=True)
    ]
    assert sum(right) / len(right) >= 0.7
