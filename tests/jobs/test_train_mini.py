import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from jobs import train_mini
from omnisift.checkpoint import build_selector, load_backbone, read_selector


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    common = ("--steps", "1", "--grids", "6", "--rate", "1e-3", "--workers", "0")
    monkeypatch.setattr(sys, "argv", ["train_mini.py", *arguments, *common])
    train_mini.main()


def test_both_stages_leave_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = str(tmp_path / "backbone"), str(tmp_path / "compressed")
    train(monkeypatch, "--stage", "backbone", "--output", first)
    assert not read_selector(Path(first, "model")).trained
    train(
        monkeypatch,
        *("--stage", "compressed", "--start", first, "--output", second),
        *("--method", "omnisift", "--retain", "0.25", "--exploration", "0.1"),
    )
    folder = Path(second, "model")
    build_selector(read_selector(folder), load_backbone(folder).width)
    assert (Path(second) / "curves.jsonl").is_file()


def test_a_backbone_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "backbone"
    train(monkeypatch, "--stage", "backbone", "--output", str(first))
    file = first / "student.safetensors"
    weights = load_file(file)
    # The published names, whatever transformers calls them in memory.
    assert {"thinker.lm_head.weight", "thinker.visual.merger.ln_q.weight"} <= weights.keys()
    del weights["sound_head.bias"]
    save_file(weights, file)
    with pytest.raises(SystemExit, match=r"student\.safetensors: sound_head\.bias is missing \(1"):
        train(
            monkeypatch,
            *("--stage", "compressed", "--start", str(first), "--output", str(tmp_path / "next")),
        )


def test_the_second_stage_needs_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--start names the backbone's run"):
        train(monkeypatch, "--stage", "compressed", "--output", str(tmp_path))


@pytest.mark.parametrize("method", ["omnizip", "dycoke"])
def test_what_has_nothing_to_train_is_refused_before_the_first_step(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(
            monkeypatch,
            *("--stage", "backbone", "--output", str(tmp_path / "run"), "--method", method),
        )
    assert "--method: invalid choice" in capsys.readouterr().err
