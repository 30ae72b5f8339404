"""Answer: kept tokens + prompts -> text."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from omnisift.answer import Answer as Text
from omnisift.checkpoint import resolve
from omnisift.codec import decode
from omnisift.compressor import KeptTokens
from omnisift.engines.interface import AskedVideo, Engine, Question, Refusal
from omnisift.engines.transformers_engine import TransformersEngine
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions
from omnisift.prompts import Sampling
from pipeline import rows

_ADVICE = {
    "too_long": "shorten the prompt, lower answer.max_new_tokens or cut the video",
    "out_of_memory": "lower compression.retain or give the actor more of the GPU "
    "(pools.answer_gpus)",
    "bad_tokens": "its tokens are of another model; use an empty cache.path, once with "
    "retry.failed=true",
    "engine_died": "the actor's log says why; lower answer.gpu_memory_fraction if it was memory",
}


@dataclass(frozen=True)
class AnswerSettings:
    """What an answering actor is started with."""

    engine: Literal["transformers", "vllm"]
    model: str
    revision: str
    system_prompt: str
    max_new_tokens: int
    sampling: Sampling
    seed: int
    vllm: VllmOptions
    device: str  # "cuda" or "cpu"


class Answer:
    """Ask each video its prompts.

    Reads: tokens, positions, next_position, prompts. Writes: answers, one for each prompt and in
    their order. A prompt that cannot be answered fails alone. Calls may overlap with vLLM, which
    batches them all; with transformers they may not.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        """Start the engine."""
        self._seed = settings.seed
        self._clock = _SharedClock()
        folder: Path = resolve(settings.model, settings.revision)
        common: dict[str, Any] = {
            "system_prompt": settings.system_prompt,
            "max_new_tokens": settings.max_new_tokens,
            "sampling": settings.sampling,
            "device": settings.device,
        }
        self.engine: Engine
        if settings.engine == "vllm":
            self._decode_on = "cpu"  # vLLM's own processes hold the GPU
            self.engine = VllmEngine(folder, options=settings.vllm, **common)
        else:
            self._decode_on = settings.device
            self.engine = TransformersEngine(folder, **common)

    def __del__(self) -> None:
        """End the engine's processes: Ray deletes the stage before it ends the actor."""
        if hasattr(self, "engine"):  # else it did not start
            self.engine.close()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of rows.KEPT into one of rows.ANSWERED; its prompts are one batch."""
        videos = list(rows.iterate(block))
        with self._clock.measure() as spent:
            asked = {
                number: self._asked(video)
                for number, video in enumerate(videos)
                if video["error_type"] is None and video["prompts"]
            }
            given = dict(zip(asked, self.engine(list(asked.values())), strict=True))
        each = spent[0] / max(1, sum(map(len, given.values())))
        return rows.build(
            [
                {
                    **video,
                    "answers": [
                        _columns(video["uri"], prompt["prompt_id"], answer)
                        for prompt, answer in zip(
                            video["prompts"] if number in given else (),
                            given.get(number, ()),
                            strict=True,
                        )
                    ],
                    "answer_s": each * len(given[number]) if number in given else None,
                }
                for number, video in enumerate(videos)
            ],
            rows.ANSWERED,
        )

    def _asked(self, video: dict[str, Any]) -> AskedVideo:
        return AskedVideo(
            key=video["video_key"],
            kept=kept_tokens(video, self._decode_on),
            questions=[
                Question(
                    prompt["prompt"],
                    tuple(prompt["choices"] or ()),
                    _seed_of(self._seed, video["video_key"], prompt["prompt"]),
                )
                for prompt in video["prompts"]
            ],
        )


def _columns(uri: str, prompt_id: str, answer: Text | Refusal) -> dict[str, Any]:
    if isinstance(answer, Refusal):
        advice = _ADVICE[answer.error_type]
        message = f"{uri}, prompt {prompt_id}: {answer.message}; {advice}"
        return {
            "prompt_id": prompt_id,
            "error_type": answer.error_type,
            "error_message": message,
        }
    return {
        "prompt_id": prompt_id,
        "text": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_output_tokens": answer.num_output_tokens,
        "finish_reason": answer.finish_reason,
    }


def _seed_of(seed: int, video_key: str, prompt: str) -> int:
    """Return a seed of the question's own, so that it is answered alike in any batch."""
    return int(hashlib.sha256(f"{seed} {video_key} {prompt}".encode()).hexdigest()[:8], 16)


def kept_tokens(row: dict[str, Any], device: str | torch.device = "cpu") -> KeptTokens:
    """Return the kept tokens of a row of rows.KEPT, dequantised on `device`."""
    num_tokens, width = row["token_shape"]
    return KeptTokens(
        embeds=decode(row["tokens"], row["token_dtype"], (num_tokens, width), device=device),
        positions=np.array(row["positions"], np.int32).reshape(3, -1),
        modality=np.array(row["modality"], np.uint8),
        next_position=row["next_position"],
        kept_index=np.array(row["kept_index"], np.int32),
        num_video_tokens=row["num_video_tokens"],
        num_audio_tokens=row["num_audio_tokens"],
    )


class _SharedClock:
    """Share the seconds out among calls that overlap, so that their sum is the time they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._share = 0.0  # seconds a call would have had that was there all the time
        self._last = 0.0

    def _tick(self, change: int) -> float:
        with self._lock:
            now = time.perf_counter()
            if self._calls:
                self._share += (now - self._last) / self._calls
            self._last = now
            self._calls += change
            return self._share

    @contextmanager
    def measure(self) -> Iterator[list[float]]:
        """Yield a list that holds the call's seconds once it has ended."""
        spent: list[float] = []
        start = self._tick(1)
        try:
            yield spent
        finally:
            spent.append(self._tick(-1) - start)
