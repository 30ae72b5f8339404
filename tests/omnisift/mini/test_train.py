from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compress import compress_batch
from omnisift.compressor import VideoCompressor
from omnisift.media import SAMPLE_RATE, log_mel
from omnisift.mini import towers
from omnisift.mini.layers import GatedLayer, text_layer
from omnisift.mini.layouts import lay_out, place, shares_for
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
from omnisift.mini.train import Recipe, Trainer, _kept_metrics, run_stage
from omnisift.mini.world import NOISES, draw_scene
from omnisift.prompts import PromptText
from omnisift.training.loop import Schedule
from pipeline.testing.scene_clips import decode_scene

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
    lessons = Lessons(PromptText(tokenizer, "Be brief."), seed=6, steps=4, grids=20, slots=SLOTS)
    assert lessons[0].tail_samples > 320  # more than two mel frames: a token
    return lessons


def test_frames_in_batches_equal_the_stock_tower(student: Student) -> None:
    scenes = [draw_scene(1, index, 6) for index in range(2)]
    frames, _ = draw(plan_pictures(scenes), torch.arange(12) / 2)
    pixels = (frames * 255).round().byte()
    stock = Backbone(student.model, towers="stock")
    video = towers.encode_frames(student.model, pixels.float() / 255).flatten(1, 2)
    for row in range(2):
        [seen] = stock.encode_video([pixels[row].permute(0, 2, 3, 1)])
        torch.testing.assert_close(video[row], seen, atol=2e-5, rtol=1e-4)


# Of 0, 1, 3, 4 and 7 mel frames: as many as fill the windows, and rows with and without a pair.
@pytest.mark.parametrize("tail_samples", [0, 1, 400, 512, 1023])
def test_sound_in_batches_equals_the_stock_tower(student: Student, tail_samples: int) -> None:
    waves = render(plan_sounds([draw_scene(1, index, 6) for index in range(2)]), 6)
    torch.manual_seed(4)
    waves = torch.cat([waves, 1e-3 * torch.randn(2, tail_samples)], dim=1)
    stock = Backbone(student.model, towers="stock")
    audio = towers.encode_mel(student.model, log_mel(waves))
    for row in range(2):
        [heard] = stock.encode_audio([waves[row]])
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
    seen = observe(
        *(lesson.pictures, lesson.sounds, lesson.duration_s),
        rough=True,
        tail_samples=lesson.tail_samples,
    )
    backbone = Backbone(student.model)
    video = towers.encode_frames(student.model, seen.frames)
    audio = towers.encode_mel(student.model, seen.mel)
    clips = lay_out(backbone.layout, lesson.duration_s, audio.shape[1], CPU)
    embeds = place(student.model, clips, video, audio)
    prefix = torch.tensor(lessons.text.before_video)
    embed = student.model.get_input_embeddings()
    sums = {"question": [0.0, 0], "caption": [0.0, 0]}
    for row in range(len(embeds)):
        block, positions = embeds[row], clips.positions
        if retain is not None:
            [kept] = compress_batch(
                [(block, clips.ids, positions)],
                shares_for(retain),
                backbone.layout,
                selector=student.selector,
            )
            block, positions = kept.embeds, positions[:, kept.kept_index]
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


def test_of_the_tail_training_says_that_nothing_sounds(student: Student, lessons: Lessons) -> None:
    lesson = lessons[0]
    recipe = Recipe("backbone", Schedule(steps=4, learning_rate=1e-3), seed=0)
    torch.manual_seed(3)
    _, metrics = Trainer(student, lessons, recipe, CPU).loss(lesson, 0.0)
    torch.manual_seed(3)
    seen = observe(
        *(lesson.pictures, lesson.sounds, lesson.duration_s),
        rough=True,
        tail_samples=lesson.tail_samples,
    )
    logits = student.sound_head(towers.encode_mel(student.model, seen.mel))
    silence = len(NOISES)
    labels = torch.full(logits.shape[:2], silence)
    assert labels.shape[1] == 25 * lesson.duration_s + 1
    plan = lesson.sounds
    columns = torch.stack([plan.noise, plan.start, plan.duration, plan.loudness], dim=-1)
    for row, sounds in enumerate(columns.tolist()):
        for noise, start, length, loudness in sounds:
            for token in range(25 * lesson.duration_s):
                inside = min(start + length, (token + 1) / 25) - max(start, token / 25)
                if loudness and inside > 0.01:
                    labels[row, token] = noise
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert metrics["loss/sound"].item() == pytest.approx(expected.item(), rel=1e-4)


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
    plan = Trainer(student, lessons, recipe, CPU)._plan(6, 152, 2, shares_for(0.25))
    [audio] = plan.audio
    first = audio.audio[:, 0]
    assert len(first) == 2 * 3
    assert (first.diff() > 0).all()


@pytest.mark.parametrize("sounding", [0.0, 0.5, 1.0])
def test_what_is_kept_of_a_batch_with_one_kind_of_sound_is_a_number(sounding: float) -> None:
    kept = torch.tensor([[True, False, False, False], [True, True, True, False]])
    loud = torch.arange(8).view(2, 4) < 8 * sounding
    of_sounding, of_silent = _kept_metrics(kept, loud).values()
    assert float(of_sounding) == (0.0, 0.25, 0.5)[int(2 * sounding)]
    assert float(of_silent) == (0.5, 0.75, 0.0)[int(2 * sounding)]


def test_lessons_repeat_and_do_not_share_scenes(lessons: Lessons) -> None:
    again = lessons[1]
    assert torch.equal(again.ids, lessons[1].ids)
    assert torch.equal(again.pictures.home, lessons[1].pictures.home)
    assert not set(lessons[0].keys) & set(again.keys)
    # What is asked for is the next token of the answer, and only of that.
    for row, targets in zip(again.ids, again.targets, strict=True):
        told = (targets != IGNORED).nonzero().flatten()
        assert torch.equal(row[told[told < len(row) - 1] + 1], targets[told[told < len(row) - 1]])


def test_the_sound_of_half_the_lessons_goes_on_as_a_codec_leaves_it(lessons: Lessons) -> None:
    many = Lessons(lessons.text, seed=2, steps=200, grids=1, slots=SLOTS)
    tails = [lesson.tail_samples for lesson in (many[step] for step in range(200))]
    some = [tail for tail in tails if tail]
    assert 80 < len(some) < 120
    assert 1 <= min(some) < 100
    assert 924 < max(some) <= 1023


def test_training_lays_out_and_labels_what_a_file_decodes_to(student: Student) -> None:
    scene = next(
        scene
        for scene in (draw_scene(1, index, 10) for index in range(20))
        if scene.ambience == "noise"
    )
    clip = decode_scene(scene)
    tail_samples = len(clip.audio) - 10 * SAMPLE_RATE
    assert tail_samples == 768  # 157 frames of AAC
    seen = observe(
        *(plan_pictures([scene]), plan_sounds([scene]), 10), rough=True, tail_samples=tail_samples
    )
    backbone = Backbone(student.model)
    clips = lay_out(backbone.layout, 10, seen.sound.shape[1], CPU)
    block = VideoCompressor(backbone, student.selector, shares_for(1.0)).block_of(clip)
    assert np.array_equal(clips.ids.numpy(), block.ids)
    assert np.array_equal(clips.positions.numpy(), block.positions)
    assert clips.block.next_position == block.next_position
    assert len(clips.audio) == towers.encode_mel(student.model, seen.mel).shape[1] == 251
    assert seen.sound[0, -1] == -1
    # The tail is as quiet in training as the decoder's: both far below the noise before it.
    decoded, trained = log_mel(clip.audio)[:, 1002:], seen.mel[0, :, 1002:]
    before = log_mel(clip.audio)[:, 900:1000].mean()
    for tail in (decoded, trained):
        assert tail.mean() < before - 0.2
    assert tail.shape == decoded.shape


@pytest.mark.parametrize("retain", [0.1, 0.15, 0.25, 0.35])
def test_shares_keep_the_share_of_all_tokens_they_are_made_for(retain: float) -> None:
    shares = shares_for(retain)
    # By hand, chunk by chunk: two grids of 64, 50 audio tokens.
    kept = 2 * (64 - int(64 * shares.video)) + 50 - int(50 * shares.audio)
    assert kept / 178 == pytest.approx(retain, abs=1 / 178)
