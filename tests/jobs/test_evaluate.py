import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs import evaluate
from omnisift.compressor import Clip
from omnisift.mini.evaluate import Held, Setting, _score
from omnisift.mini.questions import Question


def test_the_table_keeps_what_it_says_and_compression_costs_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.json"
    arguments = ["--scenes", "3", "--settings", "none:1", "omnisift:.25", "random:.1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--json", str(file)])
    evaluate.main()
    full, sifted, random = json.loads(file.read_text())
    assert full["retained"] == 1
    assert sifted["retained"] == pytest.approx(0.25, abs=0.02)
    assert random["retained"] == pytest.approx(0.1, abs=0.02)
    assert full["accuracy"] > random["accuracy"]
    printed = capsys.readouterr().out
    assert "3 scenes, 18 questions" in printed
    assert f"| omnisift | {100 * sifted['retained']:.1f} | {sifted['accuracy']:.1f} (" in printed


def test_intervals_are_those_of_videos_drawn_whole() -> None:
    # Videos are all right or all wrong: half of 100, so the mean's deviation is .5 / 10.
    right = np.repeat(np.arange(100) % 2, 6).reshape(100, 6).astype(float)
    asked = [Question("context", "?", "!")] * 3 + [Question("counting", "?", "!")] * 3
    clip = Clip.__new__(Clip)  # not looked at
    held = [Held(str(number), clip, asked) for number in range(100)]
    score = _score(Setting("none", 1.0), 1.0, right, held)
    assert score.accuracy == 50
    assert score.low == pytest.approx(50 - 1.96 * 5, abs=1.5)
    assert score.high == pytest.approx(50 + 1.96 * 5, abs=1.5)
    assert score.by_kind == {"context": 50, "counting": 50}
