"""Say what the small model still answers from shortened prompts: `python jobs/evaluate.py`.

The scenes are rendered as mp4 files and decoded as the pipeline does. Without `--arm` the shipped
model is asked; docs/results.md has the table of all methods.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from multiprocessing import get_context
from operator import add
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from omnisift.answer import Answerer
from omnisift.backbone import Backbone
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.codec import Codec
from omnisift.compressor import VideoCompressor
from omnisift.media import SAMPLE_RATE
from omnisift.methods import METHODS
from omnisift.mini.encode_once import Encoded, EncodeOnce
from omnisift.mini.evaluate import (
    CARRIED,
    Held,
    Outcome,
    Score,
    background_cosine,
    blind_answers,
    run_setting,
    score,
    what_tokens_carry,
)
from omnisift.mini.layouts import shares_for
from omnisift.mini.questions import KINDS, draw_questions
from omnisift.mini.shipped import FOLDER, HELD_OUT_SEED
from omnisift.mini.world import draw_scene
from pipeline.config import AnswerConfig
from pipeline.testing.scene_clips import decode_scene

_BLIND_SEED, _BLIND_SCENES = 10, 5_000  # of the world that was trained on


class Arm(NamedTuple):
    """A line of the plot: a method on models that differ by their seed, at several shares."""

    name: str
    folders: tuple[Path, ...]
    method: str
    retain: tuple[float, ...]


SHIPPED = (
    Arm("all tokens", (FOLDER,), "none", (1.0,)),
    Arm("OmniSIFT", (FOLDER,), "omnisift", (0.35, 0.25)),
    Arm("its LLM, audio at random", (FOLDER,), "omnisift_random_audio", (0.25,)),
    Arm("its LLM, all at random", (FOLDER,), "random", (0.25,)),
)


class Work(NamedTuple):
    """What each process needs to know."""

    arms: Sequence[Arm]
    questions: int
    cut_sound: bool
    codec: Codec | None
    device: str
    alone: bool


class Found(NamedTuple):
    """What a process found on its scenes: outcomes by (arm, share, run)."""

    scenes: int
    outcomes: dict[tuple[int, float, int], Outcome]
    cosines: dict[Path, float]  # of background tokens


@dataclass(frozen=True)
class Row:
    """A share of an arm."""

    name: str
    retain: float  # asked for
    kept: float  # percent of all tokens
    score: Score
    carried: dict[str, float]  # percent kept of the tokens that carry this


def _arm(words: Sequence[str]) -> Arm:
    if len(words) < 4:
        raise SystemExit("--arm needs NAME FOLDER[,FOLDER...] METHOD RETAIN..., got " + str(words))
    name, folders, method, *retain = words
    if method not in METHODS:
        raise SystemExit(f"--arm {name}: the method is one of {', '.join(METHODS)}, not {method}")
    return Arm(name, tuple(map(Path, folders.split(","))), method, tuple(map(float, retain)))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        metavar="NAME FOLDER[,FOLDER] METHOD RETAIN",
        help="a method on models that differ by their seed; the first arm is what others lose to",
    )
    parser.add_argument("--first", type=int, default=100, help="number of the first scene")
    parser.add_argument("--scenes", type=int, default=40, help="how many are held out")
    parser.add_argument("--questions", type=int, default=6, help="asked about each")
    parser.add_argument(
        "--cut-sound", action="store_true", help="to the scene's length: AAC's last frame is whole"
    )
    parser.add_argument("--codec", choices=get_args(Codec), help="write the tokens with it between")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="GPUs are shared out among the processes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG of accuracy over retained share")
    return parser.parse_args()


def hold_out(work: Work, numbers: Sequence[int], compressor: VideoCompressor) -> Iterator[Held]:
    """Render scenes as mp4 files and decode them as the pipeline does."""
    for number in numbers:
        scene = draw_scene(HELD_OUT_SEED, number)
        clip = decode_scene(scene)
        if work.cut_sound:
            clip = replace(clip, audio=clip.audio[: scene.duration_s * SAMPLE_RATE])
        carries = what_tokens_carry(scene, compressor, clip)
        yield Held(str(number), clip, draw_questions(scene, 0, work.questions), carries)


def _load(folder: Path, device: str, encoded: Encoded) -> Backbone:
    # In float32 on a GPU too, so that the figures are those of a CPU.
    return EncodeOnce(load_backbone(folder, device=device).model.float(), encoded)


def find_out(work: Work, worker: int, numbers: Sequence[int]) -> Found:
    """Run all arms on some scenes."""
    if not work.alone:
        torch.set_num_threads(1)
    device = work.device
    if device == "cuda":
        device = f"cuda:{worker % torch.cuda.device_count()}"
    folders = dict.fromkeys(folder for arm in work.arms for folder in arm.folders)
    held: list[Held] = []
    encoded = Encoded()
    found = Found(len(numbers), {}, {})
    for folder in folders:
        backbone = _load(folder, device, encoded)
        answerer = Answerer(
            backbone,
            load_tokenizer(folder),
            system_prompt=AnswerConfig().system_prompt,
            max_new_tokens=4,
        )
        selector = build_selector(read_selector(folder), backbone.width)
        if not held:
            layout = VideoCompressor(backbone, selector, shares_for(1.0))
            held = list(hold_out(work, numbers, layout))
        found.cosines[folder] = background_cosine(backbone, held)
        for index, arm in enumerate(work.arms):
            for run, arm_folder in enumerate(arm.folders):
                for retain in arm.retain if arm_folder == folder else ():
                    found.outcomes[index, retain, run] = run_setting(
                        backbone,
                        selector,
                        answerer,
                        held,
                        method=arm.method,
                        retain=retain,
                        codec=work.codec,
                    )
    return found


def find_all(work: Work, numbers: Sequence[int], workers: int) -> list[Found]:
    """Share the scenes out among processes."""
    if workers == 1:
        return [find_out(work, 0, numbers)]
    shards = [numbers[worker::workers] for worker in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(find_out, work), range(workers), shards))


def table(
    work: Work, outcomes: Mapping[tuple[int, float, int], Outcome], numbers: Sequence[int]
) -> Iterator[Row]:
    """Yield a row for each share of each arm, and one for a guess from the question alone."""
    asked = [draw_questions(draw_scene(HELD_OUT_SEED, n), 0, work.questions) for n in numbers]
    kinds_VQ = np.array([[question.kind for question in some] for some in asked])

    def right(said: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        return np.array(
            [
                [text == question.answer for text, question in zip(texts, some, strict=True)]
                for texts, some in zip(said, asked, strict=True)
            ],
            float,
        )

    first: NDArray[np.float64] | None = None
    for index, arm in enumerate(work.arms):
        for retain in arm.retain:
            runs = [outcomes[index, retain, run] for run in range(len(arm.folders))]
            right_RVQ = np.stack([right([run.said[str(n)] for n in numbers]) for run in runs])
            first = right_RVQ.mean(0) if first is None else first
            together = reduce(add, (Counter(run.kept) for run in runs))
            everything = reduce(add, (Counter(run.all) for run in runs))
            tokens = np.array([run.tokens[str(n)] for run in runs for n in numbers]).sum(0)
            yield Row(
                arm.name,
                retain,
                100 * float(tokens[0] / tokens[1]),
                score(right_RVQ, first, kinds_VQ),
                {what: 100 * together[what] / everything[what] for what in CARRIED[:-1]},
            )
    blind = right(blind_answers(asked, seed=_BLIND_SEED, scenes=_BLIND_SCENES))[None]
    yield Row("a guess from the question", 0.0, 0.0, score(blind, blind[0], kinds_VQ), {})


def print_table(rows: Sequence[Row], cosines: Mapping[Path, float]) -> None:
    """Print the rows as Markdown."""
    ahead = f"ahead of {rows[0].name}"
    head = ["", "tokens kept, %", "right, % (95 %; runs)", f"{ahead} (95 %)", *KINDS]
    head += [f"{what} kept, %" for what in CARRIED[:-1]]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        one = row.score
        runs = f"; {', '.join(f'{run:.1f}' for run in one.runs)}" if len(one.runs) > 1 else ""
        cells = [
            row.name,
            f"{row.kept:.1f}",
            f"{one.accuracy:.1f} ({one.low:.1f}..{one.high:.1f}{runs})",
            f"{one.ahead:+.1f} ({one.ahead_low:+.1f}..{one.ahead_high:+.1f})" if row.kept else "",
            *(f"{one.by_kind[kind]:.1f}" if kind in one.by_kind else "" for kind in KINDS),
            *(f"{row.carried[what]:.0f}" if row.carried else "" for what in CARRIED[:-1]),
        ]
        print(f"| {' | '.join(cells)} |")
    for folder, cosine in cosines.items():
        print(f"cosine of background tokens to the next grid's, {folder}: {cosine:.4f}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over the share of tokens that was kept."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(row.name for row in rows if row.kept)
    for name, colour in zip(names, colormaps["tab20"](np.arange(20)), strict=False):
        some = sorted((row for row in rows if row.name == name), key=lambda row: row.kept)
        middle = np.array([row.score.accuracy for row in some])
        if len(some) == 1:
            axes.axhline(middle[0], linestyle="--", label=name, color=colour)
            continue
        below = middle - [row.score.low for row in some]
        above = [row.score.high for row in some] - middle
        kept = [row.kept for row in some]
        axes.errorbar(kept, middle, (below, above), marker="o", capsize=2, label=name, color=colour)
    axes.set(xlabel="tokens kept, %", ylabel="questions answered right, %")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Render, decode, compress, ask, and print the table."""
    options = arguments()
    arms = [_arm(words) for words in options.arm] if options.arm else SHIPPED
    numbers = range(options.first, options.first + options.scenes)
    workers = min(options.workers, len(numbers))  # none goes without a scene
    work = Work(
        arms, options.questions, options.cut_sound, options.codec, options.device, workers == 1
    )
    print(f"{len(numbers)} scenes as mp4 files, {len(numbers) * work.questions} questions")
    found = find_all(work, numbers, workers)
    outcomes = {key: reduce(add, (f.outcomes[key] for f in found)) for key in found[0].outcomes}
    rows = list(table(work, outcomes, numbers))
    cosines = {
        folder: sum(f.cosines[folder] * f.scenes for f in found) / len(numbers)
        for folder in found[0].cosines
    }
    print_table(rows, cosines)
    if work.codec:
        alike = sum(outcome.alike for outcome in outcomes.values())
        answers = sum(map(len, (said for o in outcomes.values() for said in o.said.values())))
        share = 100 * alike / answers
        print(f"answers that {work.codec} leaves as they were: {share:.2f} % of {answers}")
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
