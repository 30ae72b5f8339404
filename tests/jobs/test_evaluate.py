import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import evaluate
from omnisift.checkpoint import build_selector, read_selector
from omnisift.compressor import VideoCompressor
from omnisift.mini.encode_once import Encoded
from omnisift.mini.evaluate import blind_answers, score
from omnisift.mini.layouts import shares_for
from omnisift.mini.questions import Question, draw_questions
from omnisift.mini.shipped import FOLDER, HELD_OUT_SEED
from omnisift.mini.world import draw_scene


def test_the_table_keeps_what_it_says_and_compression_costs_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, image = tmp_path / "scores.json", tmp_path / "plot.png"
    arms = (
        ("all", str(FOLDER), "none", "1"),
        ("sifted", f"{FOLDER},{FOLDER}", "omnisift", ".35", ".25"),
        ("random", str(FOLDER), "random", ".1"),
    )
    words = [word for arm in arms for word in ("--arm", *arm)]
    words += ["--scenes", "4", "--workers", "2", "--device", "cpu", "--codec", "int8"]
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *words, "--json", str(file), "--plot", str(image)]
    )
    monkeypatch.setattr(evaluate, "_BLIND_SCENES", 50)
    evaluate.main()
    full, wide, narrow, random, blind = json.loads(file.read_text())
    assert full["kept"] == 100
    assert set(full["carried"].values()) == {100}
    for row, retain in ((wide, 35), (narrow, 25), (random, 10)):
        assert row["kept"] == pytest.approx(retain, abs=2)
    assert wide["score"]["runs"] == [wide["score"]["accuracy"]] * 2  # twice the same model
    # It was trained to keep sounds; chance keeps what there is.
    assert narrow["carried"]["sound"] > 1.5 * narrow["carried"]["silence"]
    assert full["score"]["accuracy"] > random["score"]["accuracy"]
    assert full["score"]["accuracy"] > blind["score"]["accuracy"]
    assert image.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "4 scenes as mp4 files, 24 questions" in printed
    assert f"| sifted | {narrow['kept']:.1f} | {narrow['score']['accuracy']:.1f} (" in printed
    assert "of 144" in printed  # answers of the six runs that were compared with int8's


def test_sound_is_cut_to_the_scene_where_a_file_has_more() -> None:
    backbone = evaluate._load(FOLDER, "cpu", Encoded())
    selector = build_selector(read_selector(FOLDER), backbone.width)
    compressor = VideoCompressor(backbone, selector, shares_for(1.0))
    number = next(n for n in range(100) if draw_scene(HELD_OUT_SEED, n).duration_s == 10)
    audio = []
    for cut in (False, True):
        work = evaluate.Work((), 1, cut, None, "cpu", alone=True)
        [held] = evaluate.hold_out(work, [number], compressor)
        assert len(held.carries) == len(compressor.block_of(held.clip).ids)
        audio.append(held.clip.audio)
    whole, cut_short = audio
    assert len(whole) == 157 * 1024  # frames of AAC
    assert len(cut_short) == 160_000
    assert torch.equal(whole[:160_000], cut_short)


def test_more_processes_than_scenes_leave_no_figure_undefined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--arm", "all", str(FOLDER), "none", "1", "--scenes", "1", "--workers", "8"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--device", "cpu"])
    monkeypatch.setattr(evaluate, "_BLIND_SCENES", 50)
    evaluate.main()
    printed = capsys.readouterr().out
    assert "cosine of background tokens" in printed
    assert "nan" not in printed


def test_intervals_are_those_of_videos_drawn_whole() -> None:
    # Videos are all right or all wrong: half of 100, so the mean's deviation is .5 / 10.
    right = np.repeat(np.arange(100) % 2, 6).reshape(1, 100, 6).astype(float)
    kinds = np.array([["context"] * 3 + ["counting"] * 3] * 100)
    found = score(right, right[0], kinds)
    assert found.accuracy == 50
    assert found.low == pytest.approx(50 - 1.96 * 5, abs=1.5)
    assert found.high == pytest.approx(50 + 1.96 * 5, abs=1.5)
    assert found.by_kind == {"context": 50, "counting": 50}
    assert (found.ahead, found.ahead_low, found.ahead_high) == (0, 0, 0)  # paired, so certain


def test_runs_are_averaged_and_compared_with_the_first() -> None:
    kinds = np.array([["context"] * 6] * 50)
    first = np.ones((50, 6))
    runs = np.stack([np.ones((50, 6)), np.zeros((50, 6))])
    found = score(runs, first, kinds)
    assert found.runs == [100, 0]
    assert (found.accuracy, found.ahead) == (50, -50)


def test_a_blind_guess_is_the_most_frequent_answer() -> None:
    asked = [draw_questions(draw_scene(10, number), 0, 6) for number in range(30)]
    guessed = blind_answers(asked, seed=10, scenes=30)  # of the very scenes
    told: dict[str, list[str]] = {}
    for question in (question for some in asked for question in some):
        told.setdefault(question.text, []).append(question.answer)
    for some, guesses in zip(asked, guessed, strict=True):
        for question, guess in zip(some, guesses, strict=True):
            counts = {answer: told[question.text].count(answer) for answer in told[question.text]}
            assert counts[guess] == max(counts.values())
    assert blind_answers([[Question("counting", "never asked", "?")]], seed=10, scenes=30) != [[""]]


def test_an_arm_that_cannot_be_is_named() -> None:
    with pytest.raises(SystemExit, match="--arm x: the method is one of"):
        evaluate._arm(["x", "folder", "sift", ".5"])
    with pytest.raises(SystemExit, match="NAME FOLDER"):
        evaluate._arm(["x", "folder", "omnisift"])
