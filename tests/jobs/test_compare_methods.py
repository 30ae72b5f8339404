import json
import sys
from pathlib import Path

import pytest

from jobs import compare_methods
from jobs.compare_methods import BACKBONES, Line, Run, lines, second_stage
from omnisift.methods import METHODS, TRAINED_METHODS


def test_every_line_has_its_runs_and_every_method_its_line() -> None:
    runs = {run.name: run for run in second_stage()}
    assert len(runs) == len(list(second_stage()))
    assert {run.start for run in runs.values()} == {run.name for run in BACKBONES}
    assert {run for line in lines() for run in line.runs} == set(runs)
    assert {line.method for line in lines()} == set(METHODS)
    for line in lines():
        for name in line.runs:
            # What is not trained, or keeps other tokens on purpose, runs on what another learned.
            trained = runs[name].words[runs[name].words.index("--method") + 1]
            assert trained == line.method or trained in ("none", "omnisift")
            assert trained in TRAINED_METHODS


def test_a_study_trains_what_is_missing_and_compares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = Run("steady", ("--consistency", "0.1"))
    sifted = Run("sifted", ("--method", "omnisift", "--retain", "0.25"), "steady")
    monkeypatch.setattr(compare_methods, "BACKBONES", (backbone,))
    monkeypatch.setattr(compare_methods, "second_stage", lambda: iter([sifted]))
    drawn = [Line("all", ("sifted",), "none", ("1",)), Line("OmniSIFT", ("sifted",), "omnisift")]
    monkeypatch.setattr(compare_methods, "lines", lambda: iter(drawn))
    words = ["--folder", str(tmp_path), "--backbone-steps", "1", "--steps", "1", "--grids", "6"]
    words += ["--scenes", "2", "--processes", "1", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *words])
    compare_methods.main()
    rows = json.loads((tmp_path / "methods.json").read_text())
    assert [row["name"] for row in rows[:-1]] == ["all"] + ["OmniSIFT"] * 4
    assert [row["kept"] for row in rows[:-1]] == pytest.approx([100, 35, 25, 15, 10], abs=2.5)
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("training ") == 2
    compare_methods.main()
    assert "training " not in capsys.readouterr().out


def test_a_run_that_fails_is_named_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_methods, "BACKBONES", (Run("broken", ("--consistency", "much")),))
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"broken failed:(.|\n)*invalid float value: 'much'"):
        compare_methods.main()
