import sys
from pathlib import Path

import pytest

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


def test_the_second_stage_needs_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--start names the backbone's run"):
        train(monkeypatch, "--stage", "compressed", "--output", str(tmp_path))
