"""Train the small model by every method and compare: `jobs/compare_methods.py --folder FOLDER`.

Two backbones (with and without the consistency loss) are trained first, then all runs of the
second stage, equally long, several at a time on each GPU; then `jobs/evaluate.py` asks them all.
A run that is there is not trained again, so the same command goes on where it was cut off.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

JOBS = Path(__file__).parent
PARTS = ("backbones", "methods", "evaluate")
SHARES = ("0.35", "0.25", "0.15", "0.10")
_OMNISIFT = (
    *("--selector-steps", "100", "--selector-alone-rate", "3e-4"),
    *("--exploration", "0.1", "--selector-rate", "0.01"),
)


class Run(NamedTuple):
    """A run of jobs/train_mini.py."""

    name: str
    words: tuple[str, ...]
    start: str = ""  # the backbone it begins with; "": it is one


class Line(NamedTuple):
    """A line of the plot."""

    name: str
    runs: tuple[str, ...]
    method: str
    retain: tuple[str, ...] = SHARES


BACKBONES = (
    Run("steady", ("--consistency", "0.1")),
    Run("plain", ("--consistency", "0")),
)


def second_stage() -> Iterator[Run]:
    """Name all runs of the second stage, the slowest first."""
    yield Run("full", ("--method", "none"), "steady")
    yield Run("full_plain", ("--method", "none"), "plain")
    for seed in range(3):
        yield _compressed(f"omnisift{seed}", "omnisift", seed=seed)
    for method in ("random", "omnisift_audio_only", "omnisift_no_spatial", "omnisift_no_temporal"):
        yield _compressed(method, method)
    yield _compressed("omnisift_plain", "omnisift", start="plain")


def _compressed(name: str, method: str, *, seed: int = 0, start: str = "steady") -> Run:
    words = ("--method", method, "--retain", "0.25", "0.35", "--seed", str(seed))
    return Run(name, words + (() if method == "random" else _OMNISIFT), start)


def lines() -> Iterator[Line]:
    """Name the lines of the table; all but the trained ones run on the full backbone."""
    seeds = ("omnisift0", "omnisift1", "omnisift2")
    yield Line("all tokens", ("full",), "none", ("1",))
    yield Line("OmniSIFT", seeds, "omnisift")
    yield Line("OmniSIFT's LLM, audio at random", seeds, "omnisift_random_audio")
    yield Line("OmniSIFT's LLM, all tokens", seeds, "none", ("1",))
    yield Line("Random, trained with it", ("random",), "random")
    yield Line("Random", ("full",), "random")
    yield Line("DyCoke", ("full",), "dycoke")
    yield Line("OmniZip", ("full",), "omnizip")
    for part in ("audio_only", "no_spatial", "no_temporal"):
        name = f"omnisift_{part}"
        yield Line(f"OmniSIFT, {part.replace('_', ' ')}", (name,), name)
    yield Line("OmniSIFT, no consistency loss", ("omnisift_plain",), "omnisift")
    yield Line("all tokens, no consistency loss", ("full_plain",), "none", ("1",))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--backbone-steps", type=int, default=2200)
    parser.add_argument("--steps", type=int, default=1200, help="of a run of the second stage")
    parser.add_argument("--grids", type=int, default=720, help="seconds of video a step")
    parser.add_argument("--at-once", type=int, default=3, help="runs of the second stage a GPU")
    parser.add_argument("--workers", type=int, default=4, help="that draw scenes for each run")
    parser.add_argument("--scenes", type=int, default=500, help="held out; six questions each")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that evaluate")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    return parser.parse_args()


def command(run: Run, options: argparse.Namespace) -> list[str]:
    """Return what trains a run."""
    words = [
        sys.executable,
        str(JOBS / "train_mini.py"),
        "--output",
        str(options.folder / run.name),
    ]
    if run.start:
        words += ["--stage", "compressed", "--start", str(options.folder / run.start)]
        words += ["--steps", str(options.steps), "--rate", "6e-4"]
    else:
        words += ["--stage", "backbone", "--steps", str(options.backbone_steps), "--rate", "1.5e-3"]
    words += ["--grids", str(options.grids), "--workers", str(options.workers)]
    return [*words, *run.words]


def train_all(runs: Sequence[Run], options: argparse.Namespace, at_once: int) -> None:
    """Train runs side by side, `at_once` on each GPU; raise for one that fails."""
    gpus = max(1, torch.cuda.device_count())
    waiting = [run for run in runs if not (options.folder / run.name / "model").exists()]
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    while waiting or running:
        for name, (process, _) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    log = options.folder / f"{name}.log"
                    raise SystemExit(f"{name} failed:\n{log.read_text()[-2000:]}")
        for gpu in range(gpus):
            while waiting and sum(on == gpu for _, on in running.values()) < at_once:
                run = waiting.pop(0)
                print(f"training {run.name} on GPU {gpu}", flush=True)
                with (options.folder / f"{run.name}.log").open("wb") as log:
                    process = subprocess.Popen(
                        command(run, options),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                    )
                running[run.name] = process, gpu
        time.sleep(0.5)


def evaluate(options: argparse.Namespace) -> None:
    """Ask all models on held-out scenes; leaves methods.json, methods.md and methods.png."""
    words = [sys.executable, str(JOBS / "evaluate.py"), "--scenes", str(options.scenes)]
    words += ["--workers", str(options.processes), "--first", "1000"]
    words += ["--json", str(options.folder / "methods.json")]
    words += ["--plot", str(options.folder / "methods.png")]
    for line in lines():
        folders = ",".join(str(options.folder / run / "model") for run in line.runs)
        words += ["--arm", line.name, folders, line.method, *line.retain]
    with (options.folder / "methods.md").open("wb") as table:
        # Eager: a model this small is done before its towers are compiled.
        subprocess.run(
            words, stdout=table, check=True, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"}
        )


def main() -> None:
    """Train what is missing, then ask."""
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    if "backbones" in options.part:
        train_all(BACKBONES, options, 1)
    if "methods" in options.part:
        train_all(list(second_stage()), options, options.at_once)
    if "evaluate" in options.part:
        evaluate(options)
        print((options.folder / "methods.md").read_text())


if __name__ == "__main__":
    main()
