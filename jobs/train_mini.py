"""Train the small model: `--stage backbone`, then `--stage compressed --start FOLDER`.

With `--selector-steps` the second stage begins with the selector alone, the LLM as it was.
"""

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from omnisift.audio_selection import AudioSelector
from omnisift.checkpoint import CheckpointError
from omnisift.methods import METHODS, TRAINED_METHODS
from omnisift.mini.lessons import Lessons
from omnisift.mini.model import (
    SELECTOR_HIDDEN,
    WIDTH,
    mini_config,
    new_model,
    save_checkpoint,
    train_tokenizer,
)
from omnisift.mini.student import Student, calibrate
from omnisift.mini.train import Recipe, run_stage
from omnisift.prompts import PromptText
from omnisift.training.loop import Schedule
from pipeline.config import AnswerConfig


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--stage", choices=("backbone", "compressed"), required=True)
    parser.add_argument("--start", type=Path, help="folder of the backbone's run")
    parser.add_argument("--method", choices=TRAINED_METHODS, default="none")
    parser.add_argument("--retain", type=float, nargs="+", default=[1.0])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="learning rate")
    parser.add_argument("--grids", type=int, default=720, help="seconds of video a step")
    parser.add_argument("--consistency", type=float, default=0.0)
    parser.add_argument("--selector-steps", type=int, default=0, help="of the selector alone")
    parser.add_argument("--selector-alone-rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--exploration", type=float, default=0.0)
    parser.add_argument("--selector-rate", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw scenes")
    parser.add_argument("--log-every", type=int, default=50)
    return parser.parse_args()


def main() -> None:
    """Train, and write the checkpoint in the published format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = arguments()
    if (options.stage == "compressed") != (options.start is not None):
        raise SystemExit("--start names the backbone's run; --stage compressed needs it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(AnswerConfig().system_prompt)
    lessons = Lessons(
        PromptText(tokenizer, AnswerConfig().system_prompt),
        # Scenes of its own for every stage and seed; 1 to 9 are kept for the held-out ones.
        seed=10 + 2 * options.seed + (options.stage == "compressed"),
        steps=options.steps,
        grids=options.grids,
    )
    model = new_model(mini_config(tokenizer), seed=options.seed)
    torch.manual_seed(options.seed)
    student = Student(model, AudioSelector(WIDTH, SELECTOR_HIDDEN))
    if options.start is None:
        calibrate(student, lessons, device)
    else:
        untrained = {name: value.clone() for name, value in student.selector.state_dict().items()}
        try:
            student.restore(options.start / "student.safetensors")
        except CheckpointError as error:
            raise SystemExit(f"--start: {error}") from error
        student.selector.load_state_dict(untrained)
    recipe = Recipe(
        stage=options.stage,
        schedule=Schedule(
            steps=options.steps, learning_rate=options.rate, weight_decay=0.05, beta2=0.98
        ),
        seed=options.seed,
        method=options.method,
        retain=tuple(options.retain),
        consistency=options.consistency,
        exploration=options.exploration,
        selector_rate=options.selector_rate,
    )
    run = partial(
        run_stage,
        student,
        lessons,
        device=device,
        workers=options.workers,
        log_every=options.log_every,
    )
    if options.selector_steps:
        schedule = replace(
            recipe.schedule,
            steps=options.selector_steps,
            learning_rate=options.selector_alone_rate,
        )
        alone = replace(recipe, stage="selector", schedule=schedule, selector_rate=1.0)
        run(alone, options.output / "selector")
    run(recipe, options.output)
    student.save(options.output / "student.safetensors")
    trained = student.selector if METHODS[options.method].selector else None
    save_checkpoint(options.output / "model", student.model, trained, tokenizer)
    print(f"wrote {options.output / 'model'}")


if __name__ == "__main__":
    main()
