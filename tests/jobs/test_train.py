"""`jobs/train.py` from the command line: killed and given again, and what it refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.train import main
from omnisift.mini.tiny import write_tiny_model
from omnisift.training.curves import read_curves
from omnisift.training.state import states
from pipeline.cli import load
from pipeline.config import TrainConfig
from pipeline.testing.clips import render
from pipeline.training import train_omnisift

ROOT = Path(__file__).parents[2]


def _arguments(folder: Path, output: Path) -> list[str]:
    return [
        *(f"data={folder / 'data.jsonl'}", f"model={folder / 'model'}", f"output={output}"),
        *("batch=2", "epochs=12", "decoders=1", "checkpoint_every=3"),
        *("media.min_pixels=3136", "media.max_pixels=7056"),
    ]


def test_a_killed_training_goes_on_by_the_same_command(tmp_path: Path) -> None:
    render(tmp_path / "clips", ["h264_sound.mp4", "carphone.mp4"])
    write_tiny_model(tmp_path / "model", selector=True)
    lines = [
        {"video": f"clips/{name}", "prompt": "What?", "answer": answer}
        for name, answer in (("h264_sound.mp4", "bars"), ("carphone.mp4", "a man who talks"))
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train_omnisift(load(TrainConfig, _arguments(tmp_path, tmp_path / "whole")))

    broken = tmp_path / "broken"
    command = [sys.executable, "jobs/train.py", *_arguments(tmp_path, broken)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not states(broken) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "model").exists()
    train_omnisift(load(TrainConfig, _arguments(tmp_path, broken)))
    curves = [read_curves(at / "curves.jsonl") for at in (tmp_path / "whole", broken)]
    assert [line["loss"] for line in curves[0]] == [line["loss"] for line in curves[1]]
    weights = [load_file(at / "model/model.safetensors") for at in (tmp_path / "whole", broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_the_user_must_mend_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"data={tmp_path / 'no.jsonl'}", f"output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: data={tmp_path / 'no.jsonl'}: it cannot be read")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
