"""The answering stage, called as a plain callable."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from omnisift.answer import Answer as Text
from omnisift.codec import encode
from omnisift.engines.interface import AskedVideo, Question, Refusal
from omnisift.engines.transformers_engine import TransformersEngine
from omnisift.engines.vllm_engine import VllmOptions
from omnisift.measure.random_checkpoint import random_kept
from omnisift.mini.tiny import write_tiny_model
from omnisift.prompts import Sampling
from pipeline import rows
from pipeline.retry import COSTLY, FINAL
from pipeline.stages.answer import _ADVICE, Answer, AnswerSettings, _SharedClock, kept_tokens

PROMPTS: list[dict[str, Any]] = [
    {"prompt_id": "free", "prompt": "What is seen?", "choices": None},
    {"prompt_id": "pick", "prompt": "Which?", "choices": ["yes", "no", "a dog"]},
    {"prompt_id": "long", "prompt": "x" * 33_000, "choices": None},
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return Answer(
        AnswerSettings(
            engine="transformers",
            model=str(folder),
            revision="main",
            system_prompt="You see.",
            max_new_tokens=5,
            sampling=Sampling(),
            seed=0,
            vllm=VllmOptions(),
            device="cpu",
        )
    )


def _row(key: str, seed: int) -> dict[str, Any]:
    kept = random_kept(64, grids=2, side=2, retain=0.5, seed=seed)
    return {
        "video_key": key,
        "uri": f"s3://b/{key}.mp4",
        "prompts": PROMPTS,
        "attempts": 1,
        "tokens": encode(kept.embeds, "float32"),
        "token_dtype": "float32",
        "token_shape": list(kept.embeds.shape),
        "positions": kept.positions.tolist(),
        "modality": kept.modality.tolist(),
        "next_position": kept.next_position,
        "kept_index": kept.kept_index.tolist(),
        "num_video_tokens": kept.num_video_tokens,
        "num_audio_tokens": kept.num_audio_tokens,
    }


def test_every_prompt_gets_the_engines_answer_or_its_own_error(stage: Answer) -> None:
    good, other = _row("a", 1), _row("b", 2)
    broken = rows.failed({"video_key": "c", "uri": "c", "prompts": PROMPTS}, "decode", "x", "y")
    narrow = {**other, "video_key": "d", "uri": "d.mp4", "token_shape": [8, 32]}
    narrow |= {"tokens": bytes(8 * 32 * 4)}
    table = rows.build([good, broken, other, narrow], rows.KEPT)
    found = stage(table).to_pylist()
    assert [row["video_key"] for row in found] == ["a", "c", "b", "d"]
    assert found[1]["error_type"] == "x"
    assert (found[1]["answers"], found[1]["answer_s"]) == ([], None)
    engine = stage.engine
    assert isinstance(engine, TransformersEngine)
    questions = [Question(p["prompt"], tuple(p["choices"] or ())) for p in PROMPTS[:2]]
    for row, given in ((good, found[0]), (other, found[2])):
        expected = engine([AskedVideo(row["video_key"], kept_tokens(row), questions)])[0]
        texts = [(answer["text"], answer["finish_reason"]) for answer in given["answers"][:2]]
        assert texts == [(e.text, e.finish_reason) for e in expected if isinstance(e, Text)]
        assert given["answers"][1]["finish_reason"] == "choice"
        long = given["answers"][2]
        assert (long["prompt_id"], long["text"], long["error_type"]) == ("long", None, "too_long")
        assert row["uri"] in long["error_message"]
        assert "answer.max_new_tokens" in long["error_message"]
        assert given["answer_s"] > 0
    assert [answer["error_type"] for answer in found[3]["answers"]] == ["bad_tokens"] * 3
    assert "[8, 32], the model reads [n, 64]" in found[3]["answers"][0]["error_message"]


def test_each_question_of_each_video_has_its_own_seed(stage: Answer) -> None:
    seen: list[int] = []

    class Recorder:
        def __call__(self, videos: Sequence[AskedVideo]) -> list[list[Text | Refusal]]:
            seen.extend(question.seed for video in videos for question in video.questions)
            return [[Refusal("too_long", "")] * len(video.questions) for video in videos]

        def close(self) -> None: ...

    other = object.__new__(Answer)
    other.__dict__.update({**stage.__dict__, "engine": Recorder()})
    table = rows.build([_row("a", 1), _row("b", 1)], rows.KEPT)
    other(table)
    assert len(set(seen)) == 6
    other(table.slice(1))
    assert seen[6:] == seen[3:6]  # alone as in the batch


def test_every_refusal_is_one_the_retry_policy_knows_and_has_advice() -> None:
    assert set(_ADVICE) <= FINAL | COSTLY


def test_calls_that_overlap_share_the_seconds() -> None:
    clock = _SharedClock()
    together = threading.Barrier(4)
    shares: list[float] = []

    def call(_: int) -> None:
        with clock.measure() as spent:
            together.wait()
            threading.Event().wait(0.2)
            together.wait()
        shares.extend(spent)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert 0.19 < sum(shares) < 0.7  # not four times 0.2
    assert max(shares) < 0.5 * sum(shares)
