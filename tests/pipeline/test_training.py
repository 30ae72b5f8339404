"""Training on real files: one process, two workers of Ray Train, bad lines, a resumed run."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from omnisift.answer import Answerer
from omnisift.checkpoint import (
    SELECTOR_PREFIX,
    build_selector,
    load_backbone,
    load_tokenizer,
    read_selector,
)
from omnisift.compress import drop_shares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.mini.tiny import write_tiny_model
from omnisift.training.curves import read_curves
from omnisift.training.state import TrainingError, states
from pipeline.config import (
    CompressionConfig,
    DecodeConfig,
    MediaConfig,
    StorageConfig,
    TrainConfig,
)
from pipeline.errors import StartupError
from pipeline.film import decode_file
from pipeline.storage import Storage
from pipeline.testing.clips import render
from pipeline.training import train_omnisift
from pipeline.training_examples import Dealing
from pipeline.training_lines import read_lines

GOOD = ("h264_sound.mp4", "carphone.mp4", "late_sound.mp4")
ANSWERS = {"h264_sound.mp4": "moving bars", "carphone.mp4": "a man", "late_sound.mp4": "late"}
MEDIA = MediaConfig(min_pixels=56 * 56, max_pixels=84 * 84)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a model without a selector, and data of eight lines of which two are unusable."""
    folder = tmp_path_factory.mktemp("training")
    render(folder / "clips", [*GOOD, "truncated.mp4"])
    write_tiny_model(folder / "model")
    names = [*GOOD, *GOOD, "truncated.mp4"]
    lines = [
        json.dumps({"video": f"clips/{name}", "prompt": "What?", "answer": ANSWERS.get(name, "x")})
        for name in names
    ]
    lines.insert(3, '{"video": "clips/h264_sound.mp4", "prompt": "What?"}')
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return TrainConfig(
        data=str(folder / "data.jsonl"),
        output=str(folder / "one"),
        model=str(folder / "model"),
        batch=4,
        micro_batch=2,
        epochs=3,
        learning_rate=2e-3,
        checkpoint_every=2,
        max_skipped_share=0.5,
        decoders=1,
        media=MEDIA,
    )


@pytest.fixture(scope="module")
def alone(config: TrainConfig) -> Path:
    """What one process makes of it."""
    return train_omnisift(config).parent


@pytest.fixture
def two_cpus() -> Iterator[None]:
    before = os.environ.pop("RAY_ADDRESS", None)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
    if before is not None:
        os.environ["RAY_ADDRESS"] = before


def test_one_process_learns_and_leaves_a_checkpoint_that_answers(
    alone: Path, folder: Path, config: TrainConfig
) -> None:
    curve = read_curves(alone / "curves.jsonl")
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]  # 21 examples by fours
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert [path.name for path in states(alone)] == ["state-6"]
    skipped = [json.loads(line) for line in (alone / "skipped-0.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["error_type"]) for entry in skipped] == [
        (4, "broken_line"),
        (8, "truncated"),
    ]
    assert "data.jsonl#line 4: answer must be text, got None" in skipped[0]["message"]
    assert "truncated.mp4" in skipped[1]["message"]

    decoded = decode_file(folder / "clips" / "carphone.mp4", MEDIA, DecodeConfig())
    clip = Clip(
        torch.from_numpy(np.array(decoded.frames)), torch.from_numpy(decoded.audio), decoded.fps
    )
    texts = []
    for model in (folder / "model", alone / "model"):
        backbone = load_backbone(model)
        selector = build_selector(read_selector(model), backbone.width)
        compressor = VideoCompressor(backbone, selector, drop_shares(0.25))
        answerer = Answerer(
            backbone, load_tokenizer(model), system_prompt=config.system_prompt, max_new_tokens=8
        )
        [kept] = compressor([clip])
        [answer] = answerer([answerer.ask(answerer.open(kept), "What?")])
        texts.append(answer.text)
    assert texts[0] != texts[1]
    assert read_selector(alone / "model").trained


@pytest.mark.usefixtures("two_cpus")
def test_two_workers_of_ray_train_lose_what_one_process_loses(
    alone: Path, folder: Path, config: TrainConfig
) -> None:
    two = train_omnisift(
        replace(config, output=str(folder / "two"), workers=2, worker_cpus=0.5)
    ).parent
    curves = [read_curves(at / "curves.jsonl") for at in (alone, two)]
    assert len(curves[0]) == len(curves[1]) == 6
    for name in ("loss", "accuracy", "answer_tokens", "llm_tokens", "grad_norm"):
        one, other = ([line[name] for line in curve] for curve in curves)
        assert one == pytest.approx(other, rel=1e-4), name
    [state] = states(two)
    assert {path.name for path in state.iterdir()} == {
        "run.json",
        "worker-0.safetensors",
        "worker-1.safetensors",
    }
    tensors = [load_file(at / "model" / "model.safetensors") for at in (alone, two)]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        # AdamW's first steps divide by tiny numbers: rounding is up to an update's size
        torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=0.02, atol=4e-3)


def test_the_same_command_does_nothing_more_and_another_is_refused(
    alone: Path, config: TrainConfig
) -> None:
    curves = (alone / "curves.jsonl").read_bytes()
    train_omnisift(config)
    assert (alone / "curves.jsonl").read_bytes() == curves
    with pytest.raises(TrainingError, match="state-6: made by a run with facts"):
        train_omnisift(replace(config, batch=4, max_tokens=5000))
    with pytest.raises(TrainingError, match="state-6: made by a run with seed 0, this one has 1"):
        train_omnisift(replace(config, seed=1))


def test_the_selector_learns_alone_first_and_the_same_command_goes_on_behind_it(
    folder: Path, config: TrainConfig
) -> None:
    output = folder / "selecting"
    config = replace(config, output=str(output), epochs=1, exploration=0.1, selector_steps=3)
    model = train_omnisift(config)
    alone = output / "selector"
    assert [line["step"] for line in read_curves(alone / "curves.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in read_curves(output / "curves.jsonl")] == [1, 2]
    [state] = states(alone)
    weights = load_file(state / "worker-0.safetensors").items()
    kept = {name[len("weight/") :]: value for name, value in weights if name[:7] == "weight/"}
    assert all(name.startswith(SELECTOR_PREFIX) for name in kept)
    new = build_selector(read_selector(folder / "model"), 64, seed=config.seed).state_dict()
    moved = [
        not torch.equal(kept[f"{SELECTOR_PREFIX}{name}"], value) for name, value in new.items()
    ]
    assert len(kept) == len(new)
    assert sum(moved) > len(moved) / 2

    # Killed behind the selector's steps: they are not done again.
    published = load_file(model / "model.safetensors")
    curves = (alone / "curves.jsonl").read_bytes()
    for left in (model, *states(output)):
        shutil.rmtree(left)
    (output / "curves.jsonl").unlink()
    train_omnisift(config)
    assert (alone / "curves.jsonl").read_bytes() == curves
    again = load_file(model / "model.safetensors")
    assert published.keys() == again.keys()
    assert all(torch.equal(published[name], again[name]) for name in published)


def test_too_many_unusable_lines_stop_it_by_name(folder: Path, config: TrainConfig) -> None:
    strict = replace(config, output=str(folder / "strict"), max_skipped_share=0.1)
    with pytest.raises(
        TrainingError, match=r"1 of 8 lines cannot be used.*0\.1 allows: .*#line 4: answer must be"
    ):
        train_omnisift(strict)
    assert not (folder / "strict").exists()
    with pytest.raises(TrainingError, match=r"2 of 8 lines .*line 4: .*line 8: .*\(truncated\)"):
        train_omnisift(replace(strict, max_skipped_share=0.2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no line to learn from; the file is empty"),
        ("\n[1]\n", "the first: .*data.jsonl#line 2: it is not a JSON object"),
        ("{", "data.jsonl#line 1: it is not JSON"),
        ('{"video": "ftp://a/b", "prompt": "p", "answer": "a"}', "s3:// and local paths are read"),
        ('{"video": "a", "prompt": "p", "answer": " "}', "answer must be text, got ' '"),
    ],
)
def test_data_without_a_usable_line_is_refused(tmp_path: Path, content: str, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    with pytest.raises(StartupError, match=message):
        read_lines(Storage(StorageConfig()), str(data))
    with pytest.raises(StartupError, match=r"cannot be read: .*no\.jsonl"):
        read_lines(Storage(StorageConfig()), str(tmp_path / "no.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ""}, "data must be a JSONL file"),
        ({"output": "s3://a/b"}, "output must be a folder"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"compression": CompressionConfig(method="dycoke")}, "the others have nothing to train"),
        ({"selector_steps": 2}, "exploration must be positive where selector_steps is"),
        ({"selector_steps": -1, "exploration": 0.1}, "selector_steps must be 0, or more"),
        (
            {
                "selector_steps": 2,
                "exploration": 0.1,
                "compression": CompressionConfig(method="random"),
            },
            "selector_steps must be 0, or more where the method has a selector, got 2",
        ),
    ],
)
def test_a_configuration_refuses_nonsense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"data": "a.jsonl", "output": "out", **settings})


def test_paths_start_beside_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    videos = ["a/b.mp4", "/c.mp4", "s3://bucket/d.mp4", "file:///e.mp4"]
    data.write_text(
        "\n".join(json.dumps({"video": v, "prompt": "p", "answer": "a"}) for v in videos)
    )
    found = read_lines(Storage(StorageConfig()), str(data))
    assert [line.video for line in found.lines] == [
        str(tmp_path / "a/b.mp4"),
        "/c.mp4",
        "s3://bucket/d.mp4",
        "/e.mp4",
    ]
    assert [line.number for line in found.lines] == [1, 2, 3, 4]


@pytest.mark.parametrize(("batch", "workers"), [(4, 2), (5, 2), (3, 3), (7, 1)])
def test_every_epoch_deals_each_line_once_whatever_the_workers(batch: int, workers: int) -> None:
    """Which lines a step has depends on the seed alone, how they are dealt on the workers."""
    single = Dealing(num_lines=10, epochs=3, batch=batch, seed=5)
    hands = [replace(single, rank=rank, workers=workers) for rank in range(workers)]
    flat: list[int] = []
    for step in range(single.num_steps):
        dealt = [hand.mine(step) for hand in hands]
        assert sorted(line for hand in dealt for line in hand) == sorted(single.mine(step))
        assert {hand.largest(step) for hand in hands} == {max(map(len, dealt))}
        flat += single.mine(step)
    epochs = [flat[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]
    assert [replace(single, seed=6).mine(0)] != [single.mine(0)]
