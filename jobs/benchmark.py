"""Measure the parts against what one would run otherwise: `python jobs/benchmark.py`.

The whole table needs a GPU with 80 GB and uses the published sizes of Qwen2.5-Omni-7B with random
weights, on which time does not depend. `--small` takes the sizes of the small model that ships and
runs on a CPU. `--quick` runs the same code on any machine with a tiny model, in seconds: it shows
that the benchmark works, not how fast anything is.
"""

import argparse
import copy
import gc
import platform
from collections.abc import Iterator, Sequence

import torch
import transformers

from omnisift.backbone import Backbone
from omnisift.checkpoint import thinker_config
from omnisift.measure.compression_part import measure_compression
from omnisift.measure.llm_part import Llms, measure_prefill, measure_questions
from omnisift.measure.random_model import published_config, random_model
from omnisift.measure.table import Sizes
from omnisift.measure.towers_part import measure_towers
from omnisift.mini.shipped import FOLDER
from omnisift.mini.tiny import tiny_config

PARTS = ("compression", "towers", "prefill", "questions")


def machine(device: torch.device) -> str:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return (
        f"{name or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def choose_sizes(options: argparse.Namespace) -> Sizes:
    """Return what is measured."""
    if options.quick:
        return Sizes(
            tiny_config(),
            grids=4,
            side=2,
            chunks=(1, 4),
            kept_tokens=64,
            questions=3,
            answer_tokens=4,
            rounds=2,
        )
    of_questions: dict[str, int] = {"questions": 8, "answer_tokens": 16, "rounds": 20}
    if options.small:
        config = thinker_config(FOLDER)
        return Sizes(config, grids=20, side=8, chunks=(1, 10), kept_tokens=445, **of_questions)
    config = published_config()
    return Sizes(config, grids=128, side=16, chunks=(8, 64, 512), kept_tokens=9216, **of_questions)


def measure(parts: Sequence[str], sizes: Sizes, device: torch.device) -> Iterator[str]:
    """Yield the lines of the table, as they are measured."""
    yield "| part | ours | alternative | factor | |\n|---|---|---|---|---|"
    llm_layers = sizes.config.text_config.num_hidden_layers
    model = random_model(sizes.config, device, llm_layers=0)
    if "compression" in parts:
        yield from measure_compression(Backbone(model), sizes)
    if "towers" in parts:
        yield from measure_towers(model, sizes)
    del model
    if {"prefill", "questions"} & set(parts):
        gc.collect()
        model = random_model(sizes.config, device, llm_layers=llm_layers)
        llms = Llms(Backbone(model), copy.deepcopy(model))
        if "prefill" in parts:
            yield from measure_prefill(llms, sizes)
        if "questions" in parts:
            yield from measure_questions(llms, sizes)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a tiny model on any machine")
    size.add_argument("--small", action="store_true", help="the model that ships, on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.quick or options.small else "cuda")
    sizes = choose_sizes(options)
    print(f"{machine(device)}; median of {sizes.rounds} runs or a quarter of them (range)\n")
    for line in measure(options.parts, sizes, device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
