from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compress import compress
from omnisift.media import log_mel
from omnisift.mini import towers
from omnisift.mini.layers import GatedLayer, text_layer
from omnisift.mini.lessons import IGNORED, Lesson, Lessons, Slots
from omnisift.mini.model import (
    SELECTOR_HIDDEN,
    WIDTH,
    mini_config,
    new_model,
    save_checkpoint,
    train_tokenizer,
)
from omnisift.mini.observe import observe
from omnisift.mini.pictures import draw, plan_pictures
from omnisift.mini.sounds import plan_sounds, render
from omnisift.mini.student import Student, calibrate
from omnisift.mini.train import (
    Recipe,
    Trainer,
    lay_out,
    place,
    run_stage,
    shares_for,
)
from omnisift.mini.world import draw_scene
from omnisift.prompts import PromptText
from omnisift.training.loop import Schedule

CPU = torch.device("cpu")
SLOTS = Slots(questions=3, question_tokens=24, caption_tokens=60)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer("Be brief.")


@pytest.fixture
def student(tokenizer: PreTrainedTokenizerBase) -> Student:
    torch.manual_seed(0)
    return Student(new_model(mini_config(tokenizer), seed=0), AudioSelector(WIDTH, SELECTOR_HIDDEN))


@pytest.fixture(scope="module")
def lessons(tokenizer: PreTrainedTokenizerBase) -> Lessons:
    return Lessons(PromptText(tokenizer, "Be brief."), seed=2, steps=4, grids=20, slots=SLOTS)


def test_the_towers_in_batches_equal_the_stock_towers(student: Student) -> None:
    scenes = [draw_scene(1, index, 6) for index in range(2)]
    frames, _ = draw(plan_pictures(scenes), torch.arange(12) / 2)
    pixels = (frames * 255).round().byte()
    waves = render(plan_sounds(scenes), 6)
    stock = Backbone(student.model, towers="stock")
    video = towers.encode_frames(student.model, pixels.float() / 255).flatten(1, 2)
    audio = towers.encode_mel(student.model, log_mel(waves))
    for row in range(2):
        [seen] = stock.encode_video([pixels[row].permute(0, 2, 3, 1)])
        [heard] = stock.encode_audio([waves[row]])
        torch.testing.assert_close(video[row], seen, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(audio[row], heard, atol=2e-5, rtol=1e-4)


def test_a_text_layer_equals_transformers(student: Student) -> None:
    layer = student.text.layers[0]
    torch.manual_seed(1)
    x = torch.randn(2, 9, WIDTH)
    positions = torch.randint(0, 50, (3, 2, 9))
    cos, sin = student.text.rotary_emb(x, positions)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    expected = layer(x, attention_mask=mask, position_embeddings=(cos, sin))
    expected = expected if isinstance(expected, Tensor) else expected[0]
    got = text_layer(GatedLayer.of_text(layer), x, mask, cos[:, None], sin[:, None], 4, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def slot_losses(
    student: Student, lessons: Lessons, lesson: Lesson, retain: float | None
) -> tuple[float, float]:
    """Each slot of each scene on its own through transformers' forward: the slow oracle."""
    torch.manual_seed(3)
    seen = observe(lesson.pictures, lesson.sounds, lesson.duration_s, rough=True)
    backbone = Backbone(student.model)
    clips = lay_out(backbone.layout, lesson.duration_s, CPU)
    video = towers.encode_frames(student.model, seen.frames)
    audio = towers.encode_mel(student.model, seen.mel)
    embeds = place(student.model, clips, video, audio)
    prefix = torch.tensor(lessons.text.before_video)
    embed = student.model.get_input_embeddings()
    sums = {"question": [0.0, 0], "caption": [0.0, 0]}
    for row in range(len(embeds)):
        block, positions = embeds[row], clips.positions
        if retain is not None:
            shares = shares_for(retain)
            kept = compress(
                block,
                clips.ids,
                positions,
                selector=student.selector,
                video_drop=shares.video,
                audio_drop=shares.audio,
                video_token_id=backbone.layout.video_token_id,
                audio_token_id=backbone.layout.audio_token_id,
            )
            block, positions = kept.embeds, kept.position_ids
        start = 0
        for slot, length in enumerate(SLOTS.lengths):
            ids, targets = (
                value[row, start : start + length] for value in (lesson.ids, lesson.targets)
            )
            start += length
            behind = torch.arange(length) + len(prefix) + clips.block.next_position
            place_3L = torch.cat(
                [
                    torch.arange(len(prefix)).expand(3, -1),
                    positions + len(prefix),
                    behind.expand(3, -1),
                ],
                dim=1,
            )
            logits = student.model(
                inputs_embeds=torch.cat([embed(prefix), block, embed(ids)])[None],
                attention_mask=torch.ones(1, place_3L.shape[1], dtype=torch.long),
                position_ids=place_3L[:, None],
            ).logits[0, -length:]
            kind = "caption" if slot == SLOTS.questions else "question"
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            sums[kind][0] += float(loss.detach())
            sums[kind][1] += int((targets != IGNORED).sum())
    return tuple(total / count for total, count in sums.values())  # type: ignore[return-value]


@pytest.mark.parametrize("retain", [None, 0.25])
def test_the_loss_of_slots_side_by_side_is_that_of_each_alone(
    student: Student, lessons: Lessons, retain: float | None
) -> None:
    recipe = Recipe(
        "compressed",
        Schedule(steps=4, learning_rate=1e-3),
        seed=0,
        method="none" if retain is None else "omnisift",
        retain=(1.0 if retain is None else retain,),
    )
    lesson = lessons[0]
    trainer = Trainer(student, lessons, recipe, CPU)
    torch.manual_seed(3)
    _, metrics = trainer.loss(lesson, 0.0)
    question, told = slot_losses(student, lessons, lesson, retain)
    assert metrics["loss/questions"].item() == pytest.approx(question, rel=1e-4)
    assert metrics["loss/caption"].item() == pytest.approx(told, rel=1e-4)


def test_a_stage_trains_what_it_should_and_nothing_else(
    student: Student, lessons: Lessons, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    calibrate(student, lessons, CPU)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    recipe = Recipe(
        "compressed",
        Schedule(steps=1, learning_rate=1e-3),
        seed=0,
        method="omnisift",
        retain=(0.25,),
        exploration=0.1,
    )
    run_stage(student, lessons, recipe, tmp_path / "run", device=CPU, workers=0)
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("selector.") for name in changed)
    assert any(".layers." in name and "audio_tower" not in name for name in changed)
    assert not any("visual" in name or "audio_tower" in name for name in changed)

    folder = save_checkpoint(tmp_path / "model", student.model, student.selector, tokenizer)
    backbone, selector = load_backbone(folder), build_selector(read_selector(folder), WIDTH)
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    for name, value in selector.state_dict().items():
        expected = student.selector.state_dict()[name].bfloat16().float()
        torch.testing.assert_close(value, expected, atol=0, rtol=0)
    assert backbone.width == WIDTH


def test_the_selector_alone_learns_and_the_llm_stays(
    student: Student, lessons: Lessons, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    schedule = Schedule(steps=1, learning_rate=1e-3)
    recipe = Recipe(
        "selector", schedule, seed=0, method="omnisift", retain=(0.25,), exploration=0.1
    )
    run_stage(student, lessons, recipe, tmp_path / "run", device=CPU, workers=0)
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("selector.") for name in changed)
    # What a scene's losses are multiplied with are its own chunks: they follow one another.
    plan = Trainer(student, lessons, recipe, CPU)._plan(6, 2, shares_for(0.25))
    assert plan.audio is not None
    first = plan.audio.audio[:, 0]
    assert len(first) == 2 * 3
    assert (first.diff() > 0).all()


def test_lessons_repeat_and_do_not_share_scenes(lessons: Lessons) -> None:
    again = lessons[1]
    assert torch.equal(again.ids, lessons[1].ids)
    assert torch.equal(again.pictures.home, lessons[1].pictures.home)
    assert not set(lessons[0].keys) & set(again.keys)
    # What is asked for is the next token of the answer, and only of that.
    for row, targets in zip(again.ids, again.targets, strict=True):
        told = (targets != IGNORED).nonzero().flatten()
        assert torch.equal(row[told[told < len(row) - 1] + 1], targets[told[told < len(row) - 1]])


@pytest.mark.parametrize("retain", [0.1, 0.15, 0.25, 0.35])
def test_shares_keep_the_share_of_all_tokens_they_are_made_for(retain: float) -> None:
    shares = shares_for(retain)
    # By hand, chunk by chunk: two grids of 64, 50 audio tokens.
    kept = 2 * (64 - int(64 * shares.video)) + 50 - int(50 * shares.audio)
    assert kept / 178 == pytest.approx(retain, abs=1 / 178)
