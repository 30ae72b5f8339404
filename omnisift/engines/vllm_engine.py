"""The engine for GPUs: vLLM with continuous batching, kept tokens at their true positions."""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from omnisift.answer import Answer
from omnisift.checkpoint import load_tokenizer, thinker_config
from omnisift.compressor import TooLongError
from omnisift.engines.company import Company
from omnisift.engines.interface import AskedVideo, Question, Refusal
from omnisift.engines.option_tree import Ids, likeliest, next_tokens
from omnisift.engines.vllm_plugin import ARCHITECTURE, MODALITY
from omnisift.prompts import BadTokensError, PromptText, Sampling, check_kept, check_room

log = logging.getLogger(__name__)

_MOST_LOGPROBS = 64  # vLLM gives at most 128 chosen ones a request
# Beside what vLLM counts: captured graphs, inputs on the GPU, the allocator's fragments. Measured
# with 7B weights on an H200: 2.2 GiB (docs/results.md).
_UNCOUNTED_BYTES = 3 << 30
# How many questions may be out at each try of one: who is out at a death may be to blame for it.
# 16 at first, so that of hundreds no more are left to be asked alone; halves would narrow it down
# by a death each, which is a minute without an engine. Alone twice: the first may be by chance.
_COMPANY = (math.inf, 16, 1, 1)


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM runs; what is not here is vLLM's own default."""

    gpu_memory_fraction: float = 0.9  # weights, KV cache and working memory together
    tensor_parallel_size: int = 1
    context_tokens: int = 0  # longest prompt with its answer; 0: the model's positions
    batched_tokens: int = 16_384  # tokens of one step; more than a video has, or it is cut
    quantization: str = ""  # vLLM's name, such as fp8; empty: as the checkpoint is
    kv_cache_dtype: str = "auto"  # vLLM's name, such as fp8
    load_format: str = "auto"  # "dummy": random weights, for benchmarks
    eager: bool = False  # without captured graphs: starts sooner, decodes slower
    more: Mapping[str, Any] = field(default_factory=dict)  # of vLLM's AsyncEngineArgs


def counted_fraction(fraction: float, total_bytes: int) -> float:
    """Return the share of a GPU that vLLM is told, so that what it does not count fits as well.

    Raises ValueError where that would be nothing.
    """
    counted = fraction - _UNCOUNTED_BYTES / total_bytes
    if counted <= 0:
        raise ValueError(
            f"answer.gpu_memory_fraction={fraction:g} of {total_bytes / 2**30:.0f} GiB is no more "
            f"than the {_UNCOUNTED_BYTES / 2**30:.0f} GiB that vLLM takes beside weights and KV "
            "cache: raise it, or set answer.engine=transformers"
        )
    return counted


@dataclass(frozen=True)
class _Job:
    """One question of one video, ready to be sent."""

    item: dict[str, Any]
    key: str
    before: list[int]
    after: list[int]
    question: Question


class VllmEngine:
    """Answer questions with vLLM in processes of its own; calls from several threads overlap.

    Questions are queued in vLLM at once, so it never drains while a caller has more. A video is
    prefilled once for all its questions (prefix caching).

    When vLLM dies it is started again, and what it had not answered is asked again, 16 questions
    at a time; what was out at a second death is asked alone. Refused is only what brings it down
    twice with no other question beside it. So a death by chance costs a start, and what was out
    goes at the rate of 16 at a time; a deadly question costs four starts, and 15 others are asked
    one after the other. Questions that come meanwhile wait for these.
    """

    def __init__(
        self,
        folder: Path,
        *,
        system_prompt: str,
        max_new_tokens: int,
        sampling: Sampling,
        options: VllmOptions,
        device: str,
    ) -> None:
        """Start vLLM and wait until it is ready, about a minute for 7B weights."""
        self._folder = folder
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._options = options
        self._text = PromptText(load_tokenizer(folder), system_prompt)
        config = thinker_config(folder)
        self._placeholder: int = config.video_token_id
        self._width: int = config.text_config.hidden_size
        self._max_positions: int = config.text_config.max_position_embeddings
        self._context_tokens = options.context_tokens or self._max_positions
        self._device = device
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._numbers = count()
        self._company = Company()
        self._loop = asyncio.new_event_loop()
        # Whoever awaits it gets the AsyncLLM of now, or what its start raised.
        self._vllm: asyncio.Task[Any] = self._loop.create_task(self._start())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._wait(self._started())

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError:
            raise RuntimeError("the engine was closed while it was asked") from None

    async def _started(self) -> Any:
        return await self._vllm

    async def _start(self) -> Any:
        start = time.monotonic()
        # A fork of a process that has threads, or has looked for a GPU, cannot use the GPU.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # flashinfer's sampler is compiled on first use, which needs nvcc on every node.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        if self._context_tokens > self._max_positions:
            # Prompts may have more tokens than positions: a grid's tokens share their time.
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        from vllm import AsyncEngineArgs, __version__
        from vllm.v1.engine.async_llm import AsyncLLM

        from omnisift.engines import vllm_plugin

        vllm_plugin.register()  # here; vLLM's own processes find it by its entry point
        options = self._options
        fraction = options.gpu_memory_fraction
        if self._device == "cuda":
            from vllm.platforms import current_platform

            # Asks the driver's library: a context of this process would take memory itself.
            fraction = counted_fraction(fraction, current_platform.get_device_total_memory())
        arguments: dict[str, Any] = {
            "model": str(self._folder),
            "hf_overrides": {"architectures": [ARCHITECTURE]},
            "dtype": str(self._dtype).removeprefix("torch."),
            "max_model_len": self._context_tokens,
            "max_num_batched_tokens": options.batched_tokens,
            "gpu_memory_utilization": fraction,
            "tensor_parallel_size": options.tensor_parallel_size,
            "distributed_executor_backend": "mp" if options.tensor_parallel_size > 1 else None,
            "quantization": options.quantization or None,
            "kv_cache_dtype": options.kv_cache_dtype,
            "load_format": options.load_format,
            "enforce_eager": options.eager,
            "enable_prefix_caching": True,
            "limit_mm_per_prompt": {MODALITY: 1},
            # The checkpoint's own defaults (repetition penalty, top-k) would be added unasked.
            "generation_config": "vllm",
            "disable_log_stats": True,
            **options.more,
        }
        vllm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        # A warning, so that Ray shows it: the start is paid once an actor.
        log.warning("vLLM %s ready after %.0f s", __version__, time.monotonic() - start)
        return vllm

    def close(self) -> None:
        """End vLLM's processes, once. Calls that are not done raise RuntimeError."""
        if self._loop.is_closed():
            return
        self._wait(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut_down(self) -> None:
        # All that is left in this loop first, vLLM's reader of outputs too: a call that waits for
        # an engine that has ended waits for ever, and one whose engine died would start another.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if not self._vllm.cancelled() and not self._vllm.exception():
            self._vllm.result().shutdown()

    def __call__(self, videos: Sequence[AskedVideo]) -> list[list[Answer | Refusal]]:
        """Return an answer or a refusal for each question of each video."""
        # Converted in the caller's thread: the loop's own has vLLM to feed.
        asked = [self._asked(video) for video in videos]
        flat = iter(self._gather([self._answer(job) for jobs in asked for job in jobs]))
        return [[next(flat) for _ in jobs] for jobs in asked]

    def _asked(self, video: AskedVideo) -> Sequence[_Job | Refusal]:
        try:
            check_kept(video.kept, self._width)
        except BadTokensError as error:
            return [Refusal("bad_tokens", str(error))] * len(video.questions)
        return self._jobs(video)

    def _jobs(self, video: AskedVideo) -> list[_Job]:
        kept = video.kept
        item = {
            "kept_embeds": kept.embeds.to("cpu", self._dtype),
            "kept_positions": torch.from_numpy(kept.positions),
            "kept_next_position": torch.tensor(kept.next_position),
        }
        return [
            _Job(
                item,
                video.key,
                self._text.before_video,
                self._text.after_video(question.text),
                question,
            )
            for question in video.questions
        ]

    async def _answer(self, job: _Job | Refusal) -> Answer | Refusal:
        if isinstance(job, Refusal):
            return job
        try:
            self._check_room(job)
        except TooLongError as error:
            return Refusal("too_long", str(error))
        from vllm.v1.engine.exceptions import EngineDeadError

        for most in _COMPANY:
            async with self._company.of(most):
                start = self._vllm
                vllm = await start
                try:
                    return await (
                        self._choose(vllm, job)
                        if job.question.choices
                        else self._generate(vllm, job)
                    )
                except EngineDeadError as error:
                    log.warning("vLLM died while it answered about %s: %s", job.key, error)
                    if self._vllm is start:  # else somebody has started it again
                        vllm.shutdown()
                        self._vllm = asyncio.create_task(self._start())
        return Refusal("engine_died", "vLLM died twice while it answered this and nothing else")

    def _check_room(self, job: _Job) -> None:
        options = [self._text.choice(choice) for choice in job.question.choices]
        longest = max((len(ids) for ids in options), default=self._max_new_tokens)
        start = len(job.before) + int(job.item["kept_next_position"])
        check_room(
            next_position=start,
            num_after=len(job.after),
            max_new_tokens=longest,
            max_positions=self._max_positions,
        )
        tokens = self._num_tokens(job) + longest
        if tokens > self._context_tokens:
            raise TooLongError(
                f"video, prompt and answer are {tokens} tokens, answer.context_tokens is "
                f"{self._context_tokens}"
            )

    def _num_tokens(self, job: _Job) -> int:
        return len(job.before) + len(job.item["kept_embeds"]) + len(job.after)

    def prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt in front of the kept tokens and behind them."""
        return self._text.before_video, self._text.after_video(question)

    def outputs(self, videos: Sequence[AskedVideo], params: Any) -> list[Any]:
        """Return vLLM's own outputs for all questions, with SamplingParams of one's own."""
        vllm = self._wait(self._started())
        jobs = [job for video in videos for job in self._jobs(video)]
        return self._gather([self._send(vllm, job, params) for job in jobs])

    def text_outputs(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        """Return vLLM's own outputs for prompts of ids without a video."""
        vllm = self._wait(self._started())
        return self._gather([self._run(vllm, {"prompt_token_ids": ids}, params) for ids in prompts])

    def call(self, method: str) -> list[Any]:
        """Call a method of vLLM's workers; return what each of them returns."""
        found: list[Any] = self._wait(self._wait(self._started()).collective_rpc(method))
        return found

    def _gather(self, work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*work)

        found: list[Any] = self._wait(together())
        return found

    async def _send(self, vllm: Any, job: _Job, params: Any, answer: Ids = ()) -> Any:
        """Return vLLM's output for a question, behind the first ids of an answer to it."""
        prompt = {
            "prompt_token_ids": [*job.before, self._placeholder, *job.after, *answer],
            "multi_modal_data": {MODALITY: [job.item]},
            "multi_modal_uuids": {MODALITY: [job.key]},
        }
        return await self._run(vllm, prompt, params)

    async def _run(self, vllm: Any, prompt: dict[str, Any], params: Any) -> Any:
        number = str(next(self._numbers))
        outputs = [output async for output in vllm.generate(prompt, params, number)]
        return outputs[-1]

    async def _generate(self, vllm: Any, job: _Job) -> Answer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = self._sampling
        params = SamplingParams(
            max_tokens=self._max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=job.question.seed if sampling.temperature else None,
            stop=list(sampling.stop),
            stop_token_ids=list(self._text.ends),
            ignore_eos=True,  # the ends above are the template's; a checkpoint may name others
            detokenize=bool(sampling.stop),
            structured_outputs=(
                StructuredOutputsParams(json=sampling.json_schema) if sampling.json_schema else None
            ),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        [output] = (await self._send(vllm, job, params)).outputs
        text, length, ended = self._text.finish(list(output.token_ids), sampling.stop)
        return Answer(text, self._num_tokens(job), length, "stop" if ended else "length")

    async def _choose(self, vllm: Any, job: _Job) -> Answer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = [tuple(self._text.choice(choice)) for choice in job.question.choices]

        async def logprobs(beginning: Ids, tokens: list[int]) -> tuple[Ids, dict[int, float]]:
            params = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprob_token_ids=tokens,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            [output] = (await self._send(vllm, job, params, beginning)).outputs
            [found] = output.logprobs
            return beginning, {token: found[token].logprob for token in tokens}

        branches = [
            (beginning, tokens[start : start + _MOST_LOGPROBS])
            for beginning, tokens in next_tokens(options).items()
            for start in range(0, len(tokens), _MOST_LOGPROBS)
        ]
        found: dict[Ids, dict[int, float]] = {}
        for beginning, part in await asyncio.gather(*(logprobs(*branch) for branch in branches)):
            found.setdefault(beginning, {}).update(part)
        chosen = likeliest(options, found)
        return Answer(
            job.question.choices[chosen],
            self._num_tokens(job),
            len(options[chosen]) - 1,
            "choice",
        )
