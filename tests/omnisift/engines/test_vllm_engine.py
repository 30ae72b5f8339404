"""The engine around vLLM, with a stand-in for vLLM that computes by transformers, token by token.

What vLLM itself makes of kept tokens is compared in test_vllm_parity.py, where it is installed.
"""

import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from omnisift.backbone import Backbone
from omnisift.checkpoint import load_backbone
from omnisift.engines import vllm_plugin
from omnisift.engines.interface import AskedVideo, Question
from omnisift.engines.transformers_engine import TransformersEngine
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions, counted_fraction
from omnisift.engines.vllm_plugin import MODALITY
from omnisift.measure.random_checkpoint import random_kept
from omnisift.mini.tiny import write_tiny_model
from omnisift.prompts import Sampling, prompt_positions

ROOT = Path(__file__).parents[3]
COMMON: dict[str, Any] = {"system_prompt": "You see.", "max_new_tokens": 8, "device": "cpu"}


class EngineDeadError(Exception):
    """Named as vLLM's."""


@dataclass
class StandIn:
    """What VllmEngine uses of AsyncLLM."""

    backbone: Backbone
    placeholder: int
    deaths: list[str] = field(default_factory=list)  # videos that bring it down, once each
    alive: bool = True

    async def generate(self, prompt: Any, params: Any, _number: str) -> AsyncIterator[Any]:
        [item] = prompt["multi_modal_data"][MODALITY]
        [key] = prompt["multi_modal_uuids"][MODALITY]
        if key in self.deaths:
            self.deaths.remove(key)
            self.alive = False
        if not self.alive:
            raise EngineDeadError(key)
        ids = prompt["prompt_token_ids"]
        place = ids.index(self.placeholder)
        given = [
            self.backbone.embed(torch.tensor(ids[:place])),
            item["kept_embeds"].float(),
            self.backbone.embed(torch.tensor(ids[place + 1 :])),
        ]
        embeds = torch.cat(given)
        positions = torch.from_numpy(
            prompt_positions(
                item["kept_positions"].numpy(),
                next_position=int(item["kept_next_position"]),
                num_before=place,
                num_after=len(ids) - place - 1,
            )
        )
        said: list[int] = []
        logprobs = []
        while len(said) < params.max_tokens:
            with torch.no_grad():
                logits = self.backbone.model(
                    inputs_embeds=embeds[None], position_ids=positions[:, None]
                ).logits[0, -1]
            found = logits.log_softmax(-1)
            wanted = getattr(params, "logprob_token_ids", None) or []
            logprobs.append({t: SimpleNamespace(logprob=float(found[t])) for t in wanted})
            said.append(int(logits.argmax()))
            if said[-1] in (getattr(params, "stop_token_ids", None) or ()):
                break
            embeds = torch.cat([embeds, self.backbone.embed(torch.tensor(said[-1:]))])
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=said, logprobs=logprobs)])

    def shutdown(self) -> None:
        self.alive = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    """Start an engine on stand-ins; a new one takes over the deaths that are left."""
    params: dict[str, Any] = {"SamplingParams": SimpleNamespace, "__version__": "stand-in"}
    modules: dict[str, dict[str, Any]] = {
        "vllm": params,
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(FINAL_ONLY=2),
            "StructuredOutputsParams": SimpleNamespace,
        },
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    backbone = load_backbone(folder)
    deaths: list[str] = []

    async def start(self: VllmEngine) -> StandIn:
        self._starts += 1
        return StandIn(backbone, self._placeholder, deaths)

    monkeypatch.setattr(VllmEngine, "_start", start)
    made = VllmEngine(folder, sampling=Sampling(), options=VllmOptions(), **COMMON)
    yield made
    made.close()


def _videos() -> list[AskedVideo]:
    questions = [
        Question("What is seen?"),
        Question("Which?", ("yes", "no", "nobody", "a dog")),
        Question("How many?", tuple(f"{number}" for number in range(40))),
    ]
    return [
        AskedVideo(f"video {i}", random_kept(64, grids=i, side=2, retain=0.4, seed=i), questions)
        for i in (2, 5)
    ]


def test_answers_are_the_reference_engines(folder: Path, engine: VllmEngine) -> None:
    reference = TransformersEngine(folder, sampling=Sampling(), **COMMON)
    videos = [
        replace(video, kept=replace(video.kept, embeds=video.kept.embeds.float()))
        for video in _videos()
    ]
    assert engine(videos) == reference(videos)


def test_what_does_not_fit_is_refused_with_the_numbers(engine: VllmEngine) -> None:
    [video, _] = _videos()
    kept = video.kept
    length = sum(map(len, engine.prompt_ids("?"))) + len(kept.embeds)
    engine._context_tokens = length + COMMON["max_new_tokens"]
    for changed, kind, message in (
        ({"embeds": kept.embeds[:, :8]}, "bad_tokens", "the model reads [n, 64]"),
        ({"positions": kept.positions[:, 1:]}, "bad_tokens", "positions are"),
        (
            {"embeds": kept.embeds[:0], "positions": np.zeros((3, 0), np.int32)},
            "bad_tokens",
            "no kept tokens",
        ),
        ({"next_position": 32_768}, "too_long", "the model was made for 32768"),
    ):
        bad = replace(video, kept=replace(kept, **changed), questions=[Question("?")])
        [[refusal]] = engine([bad])
        assert (refusal.error_type, message in refusal.message) == (kind, True)  # type: ignore[union-attr]
    [fits, long] = engine([replace(video, questions=[Question("?"), Question("??")])])[0]
    assert not hasattr(fits, "error_type")
    assert f"{engine._context_tokens + 1} tokens, answer.context_tokens" in long.message  # type: ignore[union-attr]


def test_a_dead_engine_is_started_again_and_asked_again(engine: VllmEngine) -> None:
    expected = engine(_videos())
    vllm = engine._vllm
    vllm.deaths += ["video 2"]
    assert engine(_videos()) == expected
    assert engine._starts == 2
    assert not vllm.alive


def test_a_video_that_always_brings_it_down_is_refused(engine: VllmEngine) -> None:
    video = replace(_videos()[0], questions=[Question("What?")])
    engine._vllm.deaths += ["video 2"] * 9
    [[refusal]] = engine([video])
    assert refusal.error_type == "engine_died"  # type: ignore[union-attr]
    engine._vllm.deaths.clear()
    [[answer]] = engine([video])
    assert not hasattr(answer, "error_type")


def test_vllm_is_told_of_the_model_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(
        get_supported_archs=registered.keys, register_model=registered.__setitem__
    )
    module = ModuleType("vllm")
    module.__dict__["ModelRegistry"] = registry
    monkeypatch.setitem(sys.modules, "vllm", module)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place, name = project["entry-points"]["vllm.general_plugins"]["omnisift"].split(":")
    getattr(import_module(place), name)()
    getattr(import_module(place), name)()  # vLLM calls it in each process, also twice
    [(architecture, model)] = registered.items()
    assert architecture == vllm_plugin.ARCHITECTURE
    source, class_name = model.split(":")
    assert f"class {class_name}(" in (ROOT / f"{source.replace('.', '/')}.py").read_text()


def test_vllm_is_told_less_memory_than_it_may_take() -> None:
    gib = 2**30
    # An H200 with .9 of it: vLLM took 128.6 GiB where 126.4 were allowed.
    told = counted_fraction(0.9, 140 * gib) * 140
    assert told + (128.6 - 126.4) <= 0.9 * 140
    with pytest.raises(ValueError, match=r"gpu_memory_fraction=0\.1 of 24 GiB .* raise it"):
        counted_fraction(0.1, 24 * gib)
