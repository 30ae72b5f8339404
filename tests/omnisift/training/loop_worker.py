"""A training run of a few steps that may kill itself; as a script, its arguments are those of run.

Arguments: folder, step to die at.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from omnisift.training.loop import Schedule, step_seed, train


def run(folder: Path, die_at: int) -> None:
    """Train 12 steps with dropout; be killed in step `die_at`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.Tanh(), nn.Linear(7, 1))

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(step_seed(3, step))
        x = torch.randn(8, 5, generator=generator)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"accuracy": (loss < 1).float()}

    train(
        loss_of,
        dict(model.named_parameters()),
        Schedule(steps=12, learning_rate=0.05),
        folder=folder,
        seed=3,
        checkpoint_every=5,
        log_every=2,
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
