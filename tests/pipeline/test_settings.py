"""Which engine answers, and what is refused before anything starts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omnisift.checkpoint import read_selector
from omnisift.mini.tiny import write_tiny_model
from pipeline import settings
from pipeline.config import AnswerConfig, CaptionConfig, PoolsConfig
from pipeline.errors import StartupError
from pipeline.settings import choose_engine, make_settings


@pytest.fixture(params=[True, False], ids=["installed", "missing"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    found = object() if request.param else None
    monkeypatch.setattr(settings, "find_spec", lambda _name: found)
    return bool(request.param)


def test_auto_is_vllm_on_gpus_where_it_is_installed(installed: bool) -> None:
    answer = AnswerConfig()
    assert choose_engine(answer, uses_gpu=True) == ("vllm" if installed else "transformers")
    assert choose_engine(answer, uses_gpu=False) == "transformers"
    own = replace(answer, engine="transformers")
    assert choose_engine(own, uses_gpu=True) == "transformers"


def test_vllm_that_is_named_must_be_there(installed: bool) -> None:
    named = AnswerConfig(engine="vllm")
    if installed:
        assert choose_engine(named, uses_gpu=False) == "vllm"
    else:
        with pytest.raises(StartupError, match="vLLM is not installed"):
            choose_engine(named, uses_gpu=True)


@pytest.mark.parametrize(
    "only",
    [
        {"json_schema": "{}"},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"tensor_parallel_size": 2},
    ],
)
def test_what_transformers_cannot_do_is_refused(only: dict[str, Any]) -> None:
    [name] = only
    with pytest.raises(StartupError, match=f"answer.{name}=.* needs answer.engine=vllm"):
        choose_engine(AnswerConfig(engine="transformers", **only), uses_gpu=True)


def test_gpus_that_share_a_model_are_the_actors() -> None:
    places: dict[str, Any] = {"source": "s", "output": "o"}
    shared = AnswerConfig(tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"pools\.answer_gpus must be 2"):
        CaptionConfig(**places, answer=shared)
    CaptionConfig(**places, answer=shared, pools=PoolsConfig(answer_gpus=2.0))


def test_actors_load_the_commit_that_the_driver_saw(tmp_path: Path) -> None:
    """A branch may move between the driver's download and an actor's on another machine."""
    config = CaptionConfig(source=str(tmp_path), output=str(tmp_path / "out"), model="a/b")
    folder = write_tiny_model(tmp_path / "tiny")
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("5" * 40)
    shutil.copytree(folder, snapshot)
    for where, revision in ((folder, "main"), (snapshot, "5" * 40)):
        made = make_settings(config, where, read_selector(where), uses_gpu=False)
        assert made.compress["settings"].revision == revision
        assert made.answer["settings"].revision == revision
    assert made.ingredients["checkpoint"] == "5" * 40
