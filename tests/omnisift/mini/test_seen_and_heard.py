from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omnisift.media import SAMPLE_RATE
from omnisift.mini.clips import write_clip
from omnisift.mini.observe import observe
from omnisift.mini.pictures import draw, plan_pictures
from omnisift.mini.sounds import heard, plan_sounds, render
from omnisift.mini.world import Event, Scene, Sound, Thing, draw_scene
from pipeline.config import DecodeConfig, MediaConfig
from pipeline.film import decode_file

RED = Thing("red", "circle", "large", 22.0, (50.0, 60.0), (0.0, 0.0), 4.0)
BLUE = Thing("blue", "square", "small", 13.0, (120.0, 110.0), (0.0, 0.0), 4.0)
BEEP = Sound("beep", 2.0, 0.16, 1.0, 0.4, None)
CANDIDATES = [
    Scene(6, (RED, BLUE), (), (BEEP,), "plain", (170.0, 170.0), "nothing", seed)
    for seed in range(20)
]
# One whose camera stands still.
QUIET = next(scene for scene in CANDIDATES if not plan_pictures([scene]).jitter[:, :, 0].any())


def at(scene: Scene, *times: float) -> tuple[torch.Tensor, torch.Tensor]:
    frames, owner = draw(plan_pictures([scene]), torch.tensor(times))
    return frames[0], owner[0]


def test_an_object_is_where_it_stands_in_its_colour() -> None:
    frames, owner = at(QUIET, 1.0)
    red, green, blue = frames[0, :, 60, 50]
    assert red > 0.7
    assert max(green, blue) < 0.3
    assert owner[0, 60, 50] == 0
    assert owner[0, 110, 120] == 1
    assert owner[0, 10, 150] == -1
    assert (owner[0] == 0).sum() == pytest.approx(np.pi * 22**2, rel=0.1)
    assert (owner[0] == 1).sum() == pytest.approx((2 * 0.88 * 13) ** 2, rel=0.15)


def test_actions_change_what_they_say() -> None:
    def acting(action: str) -> tuple[torch.Tensor, torch.Tensor]:
        event = Event(0, action, 2.0, 1 if action == "collides" else 0)  # type: ignore[arg-type]
        return at(replace(QUIET, events=(event,)), 1.0, 2.5, 4.0)

    def area(owner: torch.Tensor) -> list[int]:
        return [int((frame == 0).sum()) for frame in owner]

    def centre(owner: torch.Tensor) -> list[list[float]]:
        return [(frame == 0).nonzero().float().mean(0).tolist() for frame in owner]

    before, during, after = area(acting("grows")[1])
    assert before == after
    assert during > 2 * before
    before, during, after = area(acting("vanishes")[1])
    assert (during, before) == (0, after)
    before, during, after = area(acting("appears")[1])
    assert (before, during) == (0, after)
    still, moved, back = centre(acting("jumps")[1])
    assert still == back
    assert moved[0] < still[0] - 15
    _, owner = acting("collides")
    away = [float(np.hypot(y - 110, x - 120)) for y, x in centre(owner)]
    assert away[1] < away[0] - 20
    frames, _ = acting("flashes")
    assert frames[1, :, 60, 50].max() < frames[0, :, 60, 50].max()  # darkened
    assert frames[1, :, 60, 50 + 27].min() > 0.9  # in a white halo


def test_a_padded_batch_draws_each_scene_as_alone() -> None:
    scenes = [draw_scene(3, index, 6) for index in range(3)]
    times = torch.arange(12) / 2
    together, owners = draw(plan_pictures(scenes), times)
    for row, scene in enumerate(scenes):
        alone, owner = draw(plan_pictures([scene]), times)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=0)
        assert (owners[row] != owner[0]).float().mean() < 1e-4


def test_a_beep_is_heard_when_and_as_high_as_it_says() -> None:
    plan = plan_sounds([QUIET])
    wave = render(plan, 6)[0].numpy()
    start, end = int(2.0 * SAMPLE_RATE), int(2.16 * SAMPLE_RATE)
    assert np.abs(wave[:start]).max() == 0
    assert np.abs(wave[end + 1 :]).max() == 0
    spectrum = np.abs(np.fft.rfft(wave[start:end]))
    assert spectrum.argmax() / 0.16 == pytest.approx(1000, abs=10)
    tokens = heard(plan, 150)[0]
    assert tokens[50:54].tolist() == [0] * 4  # 40 ms each, from 2.00 to 2.16 s
    assert (tokens >= 0).sum() == 4


def test_what_the_labels_say_of_audio_tokens_is_in_the_wave() -> None:
    scene = next(
        scene
        for scene in (draw_scene(3, index, 8) for index in range(100))
        if len(scene.sounds) > 3 and scene.ambience == "nothing"
    )
    plan = plan_sounds([scene])
    energy = render(plan, 8)[0].view(200, -1).pow(2).mean(1).sqrt()
    sounding = heard(plan, 200)[0] >= 0
    assert energy[sounding].min() > 0
    assert energy[~sounding].max() < energy[sounding].median() / 2


def test_the_owner_of_a_token_is_the_object_on_it() -> None:
    seen = observe(plan_pictures([QUIET]), plan_sounds([QUIET]), 6, rough=False)
    owner = seen.owner[0, 0].view(8, 8)
    assert owner[60 // 28, 50 // 28] == 0
    assert owner[110 // 28, 120 // 28] == 1
    assert owner[0, 5] == -1


def test_a_clip_decodes_to_what_was_drawn_and_heard(tmp_path: Path) -> None:
    scene = draw_scene(3, 1, 6)
    path = write_clip(tmp_path / "clip.mp4", scene)
    side = 224 * 224
    media = MediaConfig(min_pixels=side, max_pixels=side)
    decoded = decode_file(path, media, DecodeConfig())
    frames, _ = draw(plan_pictures([scene]), torch.arange(12) / 2)
    drawn = (frames[0].permute(0, 2, 3, 1).numpy() * 255).round()
    assert decoded.frames.shape == drawn.shape
    assert np.abs(decoded.frames - drawn).mean() < 8  # of 255: the codec, and the scaling
    wave = render(plan_sounds([scene]), 6)[0].numpy()
    both = min(len(wave), len(decoded.audio))
    assert both >= 6 * SAMPLE_RATE - 1024
    assert np.corrcoef(wave[:both], decoded.audio[:both])[0, 1] > 0.9
