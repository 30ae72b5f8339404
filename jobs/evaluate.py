"""Say what the small model still answers from shortened prompts: `python jobs/evaluate.py`."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from omnisift.answer import Answerer
from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compressor import Clip
from omnisift.mini.clips import write_clip
from omnisift.mini.evaluate import Held, Score, Setting, evaluate
from omnisift.mini.questions import KINDS, draw_questions
from omnisift.mini.shipped import FOLDER, FRAME_PIXELS, HELD_OUT_SEED
from omnisift.mini.world import draw_scene
from pipeline.config import AnswerConfig, DecodeConfig, MediaConfig
from pipeline.decoder import decode_file

SETTINGS = ("none:1", "omnisift:.35", "omnisift:.25", "omnisift_random_audio:.25", "random:.25")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder of a small model")
    parser.add_argument("--first", type=int, default=100, help="number of the first scene")
    parser.add_argument("--scenes", type=int, default=40, help="how many are held out")
    parser.add_argument("--questions", type=int, default=6, help="asked about each")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="METHOD:RETAIN")
    parser.add_argument("--json", type=Path, help="file for the scores")
    return parser.parse_args()


def hold_out(first: int, scenes: int, questions: int) -> Iterator[Held]:
    """Render scenes as mp4 files and decode them as the pipeline does."""
    media = MediaConfig(min_pixels=FRAME_PIXELS, max_pixels=FRAME_PIXELS)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + scenes):
            scene = draw_scene(HELD_OUT_SEED, number)
            path = write_clip(Path(folder, f"{number}.mp4"), scene)
            decoded = decode_file(path, media, DecodeConfig())
            path.unlink()
            frames, audio = torch.from_numpy(decoded.frames), torch.from_numpy(decoded.audio)
            asked = draw_questions(scene, 0, questions)
            yield Held(str(number), Clip(frames, audio, decoded.fps), asked)


def line(score: Score) -> str:
    """Return a score as a row of the table."""
    kinds = " | ".join(f"{score.by_kind[k]:.1f}" if k in score.by_kind else "" for k in KINDS)
    interval = f"{score.accuracy:.1f} ({score.low:.1f}-{score.high:.1f})"
    return f"| {score.setting.method} | {100 * score.retained:.1f} | {interval} | {kinds} |"


def main() -> None:
    """Render, decode, compress, ask, and print the table."""
    options = arguments()
    settings = [Setting(m, float(r)) for m, _, r in (s.partition(":") for s in options.settings)]
    backbone = load_backbone(options.model)
    system_prompt = AnswerConfig().system_prompt
    tokenizer = load_tokenizer(options.model)
    answerer = Answerer(backbone, tokenizer, system_prompt=system_prompt, max_new_tokens=4)
    selector = build_selector(read_selector(options.model), backbone.width)
    held = list(hold_out(options.first, options.scenes, options.questions))
    print(f"{len(held)} scenes, {len(held) * options.questions} questions; % right (95 %)")
    print(f"| method | tokens kept, % | all | {' | '.join(KINDS)} |\n|{'---|' * (3 + len(KINDS))}")
    scores = []
    for score in evaluate(backbone, selector, answerer, held, settings):
        print(line(score), flush=True)
        scores.append(score)
    if options.json:
        options.json.write_text(json.dumps([asdict(score) for score in scores], indent=1))


if __name__ == "__main__":
    main()
