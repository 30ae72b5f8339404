"""A vLLM that is killed or closed while questions are out leaves nobody waiting (needs vLLM)."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from omnisift.answer import Answer
from omnisift.engines.interface import AskedVideo, Question, Refusal
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions
from omnisift.measure.random_checkpoint import random_kept, write_random_llm
from omnisift.prompts import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]

GPU = torch.cuda.is_available()
QUESTIONS = [Question("What?"), Question("Which?", ("yes", "no"))]


def _core() -> int:
    """Return the id of the process that is vLLM now."""
    cores = [p for p in multiprocessing.active_children() if "EngineCore" in p.name]
    [pid] = [core.pid for core in cores]
    assert pid is not None
    return pid


def _wait_until_asked(engine: VllmEngine) -> None:
    end = time.monotonic() + 60
    while not engine._vllm.result().output_processor.has_unfinished_requests():
        assert time.monotonic() < end
        time.sleep(0.01)


def _comparable(answers: list[list[Answer | Refusal]]) -> list[Answer | Refusal | None]:
    # In 16 bits a random model's next token may fall either way.
    flat = [answer for of_video in answers for answer in of_video]
    return [None if GPU and getattr(a, "finish_reason", "") != "choice" else a for a in flat]


def test_a_killed_process_costs_no_answer_and_a_closed_one_says_so(tmp_path: Path) -> None:
    engine = VllmEngine(
        write_random_llm(tmp_path, width=256, heads=4, kv_heads=2, layers=2),
        system_prompt="You see.",
        max_new_tokens=1500,
        sampling=Sampling(),
        options=VllmOptions(
            gpu_memory_fraction=0.1,
            context_tokens=4096,
            batched_tokens=4096,
            eager=True,
            more={"kv_cache_memory_bytes": 1 << 30},
        ),
        device="cuda" if GPU else "cpu",
    )
    videos = [
        AskedVideo(f"{i}", random_kept(256, grids=4, side=3, retain=0.4, seed=i), QUESTIONS)
        for i in range(4)
    ]
    try:
        expected = engine(videos)
        core = _core()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(engine, videos)
            _wait_until_asked(engine)
            os.kill(core, signal.SIGKILL)
            given = asked.result()
        assert _core() != core

        closed: list[str] = []

        def ask() -> None:
            try:
                engine(videos)
            except RuntimeError as error:
                closed.append(str(error))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        _wait_until_asked(engine)
        engine.close()
        asking.join(60)
        assert closed == ["the engine was closed while it was asked"]
    finally:
        engine.close()
    assert all(isinstance(answer, Answer) for answers in given for answer in answers)
    assert _comparable(given) == _comparable(expected)
    for left in multiprocessing.active_children():
        left.join(60)  # killed by vLLM, and not yet gone
        assert not left.is_alive()
