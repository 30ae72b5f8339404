"""The engine around vLLM, with a stand-in for vLLM that computes by transformers, token by token.

What vLLM itself makes of kept tokens is compared in test_vllm_parity.py, where it is installed.
"""

import asyncio
import sys
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
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
    dead: bool = False
    ended: bool = False
    free: threading.Event = field(default_factory=threading.Event)  # cleared: nothing is answered
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free.set()

    async def generate(self, prompt: Any, params: Any, _number: str) -> AsyncIterator[Any]:
        [item] = prompt["multi_modal_data"][MODALITY]
        [key] = prompt["multi_modal_uuids"][MODALITY]
        self.asked.append(key)
        await self._step(key)
        if key in self.deaths:
            self.deaths.remove(key)
            self.dead = True
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
            await self._step(key)
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

    async def _step(self, key: str) -> None:
        await asyncio.sleep(0)  # the others' turn
        while not self.free.is_set():
            await asyncio.sleep(0.001)
        if self.ended:
            await asyncio.Event().wait()  # as vLLM's own: what it has not answered waits for ever
        if self.dead:
            raise EngineDeadError(key)

    def shutdown(self) -> None:
        self.ended = not self.dead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def started() -> list[StandIn]:
    """Return the stand-ins that the engine has started, the latest last."""
    return []


@pytest.fixture
def engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, started: list[StandIn]
) -> Iterator[VllmEngine]:
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
        started.append(StandIn(backbone, self._placeholder, deaths))
        return started[-1]

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


def _named(names: Sequence[str]) -> list[AskedVideo]:
    """Return a video with one question for each name."""
    [video, _] = _videos()
    return [replace(video, key=name, questions=[Question(f"What is {name}?")]) for name in names]


def _ask(engine: VllmEngine, videos: Sequence[AskedVideo]) -> Future[list[list[Any]]]:
    """Ask in a thread, which nobody has to wait for."""
    given: Future[list[list[Any]]] = Future()

    def ask() -> None:
        try:
            given.set_result(engine(videos))
        except RuntimeError as error:
            given.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return given


def _wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_dead_engine_is_started_again_and_asked_again(
    engine: VllmEngine, started: list[StandIn]
) -> None:
    expected = engine(_videos())
    started[0].deaths += ["video 2"]
    assert engine(_videos()) == expected
    assert [vllm.dead for vllm in started] == [True, False]


@pytest.mark.parametrize("num_deadly", [1, 2])
def test_a_deadly_question_is_refused_and_no_other_in_any_call(
    engine: VllmEngine, started: list[StandIn], num_deadly: int
) -> None:
    names = [f"good {number}" for number in range(40)]
    expected = dict(zip(names, engine(_named(names)), strict=True))
    deadly = [f"deadly {number}" for number in range(num_deadly)]
    started[0].deaths += deadly * 99
    asked = [[*names[:7], *deadly[:1], *names[7:20]], [*names[20:], *deadly[1:]]]
    calls = [_ask(engine, _named(part)) for part in asked]
    for part, call in zip(asked, calls, strict=True):
        for name, [given] in zip(part, call.result(timeout=120), strict=True):
            if name in deadly:
                assert (given.error_type, "nothing else" in given.message) == ("engine_died", True)
            else:
                assert [given] == expected[name]
    assert len(started) <= 1 + 4 * num_deadly
    # All asked for `expected`, all twice, a company of 16 of each deadly one alone, these again.
    most = 40 + 2 * (40 + num_deadly) + 16 * num_deadly + num_deadly
    assert sum(len(vllm.asked) for vllm in started) <= most
    started[0].deaths.clear()
    [[answer]] = engine(_named(deadly[:1]))
    assert not hasattr(answer, "error_type")


def test_a_death_alone_may_be_by_chance(engine: VllmEngine, started: list[StandIn]) -> None:
    [expected] = engine(_named(["unlucky"]))
    started[0].deaths += ["unlucky"] * 3
    assert engine(_named(["unlucky"])) == [expected]
    assert len(started) == 4


def test_a_start_that_fails_is_tried_once_and_told_to_everybody(
    engine: VllmEngine, started: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    async def fail(_self: VllmEngine) -> StandIn:
        tries.append(1)
        raise RuntimeError("no memory left on the GPU")

    monkeypatch.setattr(VllmEngine, "_start", fail)
    started[0].deaths += ["1"]
    started[0].free.clear()
    calls = [_ask(engine, _named(names)) for names in ("0123", "456")]
    _wait_until(lambda: len(started[0].asked) == 7)
    started[0].free.set()
    for call in [*calls, _ask(engine, _named("7"))]:
        with pytest.raises(RuntimeError, match="no memory left on the GPU"):
            call.result(timeout=60)
    assert len(tries) == 1
    engine.close()


def test_a_refusal_costs_a_call_beside_it_nothing(
    engine: VllmEngine, started: list[StandIn]
) -> None:
    expected = engine(_named("abcd"))
    long, narrow, good = _named(["long", "narrow", "d"])
    long = replace(long, kept=replace(long.kept, next_position=32_768))
    narrow = replace(narrow, kept=replace(narrow.kept, embeds=narrow.kept.embeds[:, :8]))
    vllm = started[0]
    vllm.asked.clear()
    vllm.free.clear()
    calls = [_ask(engine, _named("abc")), _ask(engine, [long, good, narrow])]
    _wait_until(lambda: len(vllm.asked) == 4)
    kinds = [[given.error_type] for [given] in _ask(engine, [narrow, long]).result(timeout=60)]
    assert kinds == [["bad_tokens"], ["too_long"]]  # at once, though nothing is answered
    assert not any(call.done() for call in calls)
    vllm.free.set()
    assert calls[0].result(timeout=60) == expected[:3]
    [[first], second, [third]] = calls[1].result(timeout=60)
    assert (first.error_type, second, third.error_type) == ("too_long", expected[3], "bad_tokens")
    assert sorted(vllm.asked) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("dies", ["never", "unnoticed", "noticed"])
def test_whoever_is_out_when_the_engine_is_closed_is_told_so(
    engine: VllmEngine, started: list[StandIn], monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    start = VllmEngine._start
    starting, may_start = threading.Event(), threading.Event()

    async def start_slowly(self: VllmEngine) -> StandIn:
        starting.set()
        may_start.wait(60)  # in the loop's thread, as vLLM starts
        await start(self)
        started[-1].free.clear()
        return started[-1]

    monkeypatch.setattr(VllmEngine, "_start", start_slowly)
    started[0].free.clear()
    calls = [_ask(engine, _named(names)) for names in ("abc", "de")]
    _wait_until(lambda: len(started[0].asked) == 5)
    started[0].dead = dies != "never"
    if dies == "noticed":
        started[0].free.set()
        assert starting.wait(60)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    may_start.set()
    for call in calls:
        with pytest.raises(RuntimeError, match="closed while it was asked"):
            call.result(timeout=60)
    closing.join(60)
    assert not closing.is_alive()
    assert all(vllm.dead or vllm.ended for vllm in started)
    assert len(started) == (2 if dies == "noticed" else 1)


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
