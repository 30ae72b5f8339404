"""Hold the jobs with one engine against another: `python jobs/compare_engines.py [key=value ...]`.

Scenes that the small model has not seen become mp4 files and a table of questions. Each engine
captions the scenes and answers the questions; the first run fills the token cache from which all
others answer. `--engines vllm transformers` is the default, which needs vLLM where the jobs run.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omnisift.mini.clips import write_clip
from omnisift.mini.questions import CAPTION_PROMPTS, Question, caption_match, draw_questions
from omnisift.mini.shipped import FOLDER as MODEL
from omnisift.mini.shipped import FRAME_PIXELS, HELD_OUT_SEED
from omnisift.mini.world import Scene, draw_scene
from pipeline.answers import read_answers
from pipeline.config import StorageConfig
from pipeline.storage import Storage

JOBS = Path(__file__).parent
FIRST, DURATION_S = 300, 8  # of the scenes
OPTIONS = 4  # of a question with choices
SETTINGS = (
    f"model={MODEL}",
    f"media.min_pixels={FRAME_PIXELS}",
    f"media.max_pixels={FRAME_PIXELS}",
    "compression.retain=0.35",
    "answer.max_new_tokens=112",
    "answer.context_tokens=4096",
    f"answer.prompt={CAPTION_PROMPTS[0]}",
)
# What is asked, by the beginning of its prompt_id; captions of the first job have no such id.
PARTS = {
    "caption": "captions",
    "again": "captions, asked again",
    "free": "questions",
    "choice": "questions with choices",
}
_SHOWN = 5  # answers that differ
_OPTIONS_FROM = 16  # scenes: the same options, however few are asked about

Answers = Mapping[tuple[str, str], Mapping[str, Any]]  # rows by (name of the video, what was asked)


class Asked(NamedTuple):
    """A scene and what is asked about it."""

    scene: Scene
    questions: list[Question]


class Run(NamedTuple):
    """What a job took and gave."""

    engine: str
    seconds: float
    ready: str  # what the engine's log line says of its start; "": it has none
    report: Mapping[str, Any]


def draw(scenes: int, questions: int) -> dict[str, Asked]:
    """Return scenes, always the same ones, by the name of their video."""
    drawn = [draw_scene(HELD_OUT_SEED, n, DURATION_S) for n in range(FIRST, FIRST + scenes)]
    return {
        f"{FIRST + number}.mp4": Asked(scene, draw_questions(scene, 0, questions))
        for number, scene in enumerate(drawn)
    }


def write_videos(folder: Path, asked: Mapping[str, Asked]) -> Path:
    """Render the scenes and write the table of questions beside them; return the table."""
    folder.mkdir(parents=True)
    answers: dict[str, set[str]] = defaultdict(set)
    for some in draw(_OPTIONS_FROM, 12).values():
        for question in some.questions:
            answers[question.kind].add(question.answer)
    table = folder / "questions.csv"  # local files are known by their path below this folder
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "prompt_id", "prompt", "choices"])
        for name, (scene, questions) in asked.items():
            write_clip(folder / name, scene)
            writer.writerow([name, "again", CAPTION_PROMPTS[2], ""])
            for number, question in enumerate(questions):
                others = sorted(answers[question.kind] - {question.answer})[: OPTIONS - 1]
                options = "|".join(sorted([question.answer, *others]))
                writer.writerow([name, f"free-{number}", question.text, ""])
                writer.writerow([name, f"choice-{number}", question.text, options])
    return table


def run(job: str, engine: str, source: Path, output: Path, settings: Sequence[str]) -> Run:
    """Run a job as a person would, and print what it says."""
    words = [*settings, f"source={source}", f"output={output}", f"answer.engine={engine}"]
    print(f"\n$ python jobs/{job} {' '.join(words)}", flush=True)
    start = time.perf_counter()
    ready = ""
    with subprocess.Popen(
        [sys.executable, str(JOBS / job), *words],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"ready after (\d+ s)", line):
                ready = found[1]
    if process.returncode:
        raise RuntimeError(f"{job} with {engine} ended with {process.returncode}, see above")
    report = max(output.glob("*/report.json"))  # of the latest run
    return Run(engine, time.perf_counter() - start, ready, json.loads(report.read_text()))


def print_runs(runs: Mapping[str, Sequence[Run]]) -> None:
    """Print what each run took."""
    print("\n| run | engine | seconds | engine ready after | answers | failed | answering, s |")
    print("|---|---|---|---|---|---|---|")
    for job, some in runs.items():
        for engine, seconds, ready, report in some:
            [busy_s] = [each["busy_s"] for each in report["stages"] if each["stage"] == "answer"]
            print(
                f"| {job} | {engine} | {seconds:.0f} | {ready} | {report['answers_ok']} | "
                f"{report['answers_failed']} | {busy_s:.1f} |"
            )


def read(output: Path) -> Answers:
    """Return what readers see of an output."""
    rows = read_answers(str(output), Storage(StorageConfig())).to_pylist()
    return {
        (Path(row["uri"]).name, row["prompt_id"] if _part(row["prompt_id"]) else "caption"): row
        for row in rows
    }


def _part(asked: str) -> str:
    return PARTS.get(asked.partition("-")[0], "")


def compare(engines: Sequence[str], both: Sequence[Answers], asked: Mapping[str, Asked]) -> None:
    """Print how much of the answers of two engines is equal, and some that are not.

    Raises RuntimeError when they were not asked the same.
    """
    first, second = both
    if first.keys() != second.keys():
        raise RuntimeError(
            f"{engines[0]} was asked {len(first)} times, {engines[1]} {len(second)} times, "
            f"{len(first.keys() & second.keys())} times the same: see the jobs' reports"
        )
    print(
        "\n| answers | number | equal texts | equal counts of prompt tokens | "
        f"equal reasons to finish | right: {', '.join(engines)} |\n|---|---|---|---|---|---|"
    )
    for part in PARTS.values():
        keys = [key for key in first if _part(key[1]) == part]
        equal = [
            sum(_answered(first[key]) and first[key][name] == second[key][name] for key in keys)
            for name in ("text", "num_prompt_tokens", "finish_reason")
        ]
        right = [_right({key: answers[key] for key in keys}, asked) for answers in both]
        print(f"| {part} | {len(keys)} | {' | '.join(map(str, equal))} | {', '.join(right)} |")
    differ = [key for key in sorted(first) if first[key]["text"] != second[key]["text"]]
    print(f"\n{len(differ)} of {len(first)} texts differ{':' if differ else '.'}")
    for key in differ[:_SHOWN]:
        print(f"{key[0]}, {key[1]}: {first[key]['prompt']}")
        for engine, answers in zip(engines, both, strict=True):
            row = answers[key]
            print(f"    {engine}: {row['text'] if _answered(row) else row['error_message']}")


def _answered(row: Mapping[str, Any]) -> bool:
    return bool(row["status"] == "ok")


def _right(answers: Answers, asked: Mapping[str, Asked]) -> str:
    """Say how many answers of a part are right, or sentences of captions."""
    matches = list(_matches(answers, asked))
    right, total = (sum(each) for each in zip(*matches, strict=True)) if matches else (0, 0)
    return f"{right} of {total}"


def _matches(answers: Answers, asked: Mapping[str, Asked]) -> Iterator[tuple[int, int]]:
    for (name, what), row in answers.items():
        number = what.partition("-")[2]
        if number:
            yield row["text"] == asked[name].questions[int(number)].answer, 1
        else:
            yield caption_match(row["text"] or "", asked[name].scene)


def compare_engines(folder: Path, options: argparse.Namespace) -> None:
    """Write the scenes, run both jobs with both engines, and print the tables."""
    asked = draw(options.scenes, options.questions)
    questions = write_videos(folder / "videos", asked)
    settings = [f"cache.path={folder / 'cache'}", *SETTINGS, *options.settings]
    # Numbered, so that an engine can be held against itself.
    outputs = [folder / f"{n}-{engine}" for n, engine in enumerate(options.engines, 1)]
    runs: dict[str, list[Run]] = {"captions": [], "questions": []}
    for engine, output in zip(options.engines, outputs, strict=True):
        for name, job, source in (
            ("captions", "caption_corpus.py", questions.parent),
            ("questions", "answer_questions.py", questions),
        ):
            runs[name].append(run(job, engine, source, output, settings))
    print_runs(runs)
    compare(options.engines, [read(output) for output in outputs], asked)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of both jobs")
    engines = ("vllm", "transformers")
    parser.add_argument("--engines", nargs=2, choices=engines, default=engines, help="compared")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--questions", type=int, default=12, help="about each scene, asked twice")
    parser.add_argument("--folder", type=Path, help="a new one, where all that is written stays")
    options = parser.parse_args(arguments)
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            compare_engines(Path(folder), options)
    elif options.folder.exists():  # what was answered there would not be answered again
        parser.error(f"--folder {options.folder} exists; name a new one")
    else:
        compare_engines(options.folder.resolve(), options)


if __name__ == "__main__":
    main()
