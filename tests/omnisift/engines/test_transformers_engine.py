"""One refused question, or one bad video, costs nobody else an answer."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omnisift.answer import Answer, Answerer, Prompt
from omnisift.engines.interface import AskedVideo, Question, Refusal
from omnisift.engines.transformers_engine import TransformersEngine
from omnisift.measure.random_checkpoint import random_kept
from omnisift.mini.tiny import write_tiny_model
from omnisift.prompts import Sampling

KEPT = random_kept(64, grids=3, side=3, retain=0.3, seed=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return TransformersEngine(
        folder, system_prompt="You see.", max_new_tokens=6, sampling=Sampling(), device="cpu"
    )


def test_refusals_stand_where_their_questions_stood(engine: TransformersEngine) -> None:
    questions = [Question("What?"), Question("x" * 33_000), Question("Is it?", ("yes", "no"))]
    good = AskedVideo("good", KEPT, questions)
    width = AskedVideo("width", replace(KEPT, embeds=KEPT.embeds[:, :32]), questions)
    length = AskedVideo("length", replace(KEPT, positions=KEPT.positions[:, 1:]), questions)
    none = AskedVideo(
        "none",
        replace(KEPT, embeds=torch.zeros(0, 64), positions=np.zeros((3, 0), np.int32)),
        questions,
    )
    alone = engine([AskedVideo("good", KEPT, [questions[0], questions[2]])])[0]
    given = engine([width, good, length, none])
    assert [given[1][0], given[1][2]] == alone
    assert all(isinstance(answer, Answer) for answer in alone)
    kinds = [[getattr(answer, "error_type", "ok") for answer in answers] for answers in given]
    assert kinds == [["bad_tokens"] * 3, ["ok", "too_long", "ok"], *[["bad_tokens"] * 3] * 2]
    assert isinstance(given[0][0], Refusal)
    assert "the model reads [n, 64]" in given[0][0].message


def test_a_batch_that_does_not_fit_is_halved(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Answerer.__call__
    sizes: list[int] = []

    def cramped(self: Answerer, prompts: list[Prompt]) -> list[Answer]:
        sizes.append(len(prompts))
        if len(prompts) > 1 or len(prompts[0]) > 300:
            raise torch.OutOfMemoryError
        return real(self, prompts)

    questions = [Question("a"), Question("b" * 400), Question("c")]
    expected = engine([AskedVideo("v", KEPT, questions)])[0]
    monkeypatch.setattr(Answerer, "__call__", cramped)
    first, second, third = engine([AskedVideo("v", KEPT, questions)])[0]
    assert (first, third) == (expected[0], expected[2])
    assert isinstance(second, Refusal)
    assert (second.error_type, "tokens do not fit" in second.message) == ("out_of_memory", True)
    assert sizes == [3, 1, 2, 1, 1]


def test_what_did_not_fit_is_given_back_before_the_halves_are_tried(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    held_at_emptying: list[bool] = []

    def never_fits(_self: Answerer, _prompts: list[Prompt]) -> list[Answer]:
        keys_and_values = torch.zeros(8)
        held.append(weakref.ref(keys_and_values))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Answerer, "__call__", never_fits)
    monkeypatch.setattr(
        torch.cuda,
        "empty_cache",
        lambda: held_at_emptying.append(any(tensor() is not None for tensor in held)),
    )
    engine([AskedVideo("v", KEPT, [Question("a"), Question("b")])])
    assert held_at_emptying == [False] * 3
