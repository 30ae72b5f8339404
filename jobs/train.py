"""Train OmniSIFT: `python jobs/train.py data=train.jsonl model=Qwen/Qwen2.5-Omni-7B output=...`."""

import logging
import sys

from omnisift.training.state import TrainingError
from pipeline.cli import load
from pipeline.config import TrainConfig
from pipeline.errors import StartupError
from pipeline.training import train_omnisift


def main() -> int:
    """Train to the end and say where the checkpoint lies; the same command goes on."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load(TrainConfig, sys.argv[1:])
    try:
        model = train_omnisift(config)
    except (StartupError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the checkpoint: {model}")
    print(f"the curves: {model.parent / 'curves.jsonl'}, curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
