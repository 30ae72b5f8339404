"""The training loop: a loss for each step, a schedule, and a state that resumes exactly.

The loss of a step is a function of (seed, step) alone, so nothing random has to be kept: a run
that was killed goes on from its newest state and ends with the weights of an unbroken one
(bitwise on the CPU; a GPU's sums may differ in their last bits).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from omnisift.training.curves import Curves
from omnisift.training.state import load_newest, save, world

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, a linear warm-up, then a cosine down to a floor."""

    steps: int
    learning_rate: float
    warmup_share: float = 0.05  # of the steps
    floor_share: float = 0.0  # of the learning rate, approached at the end
    weight_decay: float = 0.0  # of matrices; gains and biases never decay
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name, holds, rule in (
            ("steps", self.steps >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("warmup_share", 0 <= self.warmup_share < 1, "in [0, 1)"),
            ("floor_share", 0 <= self.floor_share <= 1, "in [0, 1]"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm > 0, "positive"),
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")

    def share(self, step: int) -> float:
        """Return the share of the learning rate that a step (from 0) takes; never exactly 0.

        transformers' cosine schedule, read one step later, so that neither the first nor the
        last step is without effect.
        """
        warmup = round(self.steps * self.warmup_share)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / (self.steps - warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.floor_share + (1 - self.floor_share) * cosine


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step: unrelated ones for neighbouring steps and seeds, in [0, 2**63)."""
    return int.from_bytes(sha256(f"{seed}/{step}".encode()).digest()[:8], "big") >> 1


def train(
    loss_of: Callable[[int], tuple[Tensor, Mapping[str, Tensor]]],
    parameters: Mapping[str, nn.Parameter],
    schedule: Schedule,
    *,
    folder: Path,
    seed: int,
    checkpoint_every: int,
    log_every: int = 10,
    rate_of: Callable[[str], float] | None = None,
) -> None:
    """Train `parameters` on the losses of steps 0, 1, ...; go on where `folder` stopped.

    `loss_of(step)` returns the loss and what is to be logged beside it (scalars on the device);
    torch's generators are seeded by (seed, step) before each call, and what it draws elsewhere
    must come from `step_seed` as well. See `train_by_gradients`.
    """

    def gradients_of(step: int) -> dict[str, Tensor]:
        loss, metrics = loss_of(step)
        loss.backward()
        return {"loss": loss, **metrics}

    train_by_gradients(
        gradients_of,
        parameters,
        schedule,
        folder=folder,
        seed=seed,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        rate_of=rate_of,
    )


def train_by_gradients(
    gradients_of: Callable[[int], Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
    schedule: Schedule,
    *,
    folder: Path,
    seed: int,
    checkpoint_every: int,
    log_every: int = 10,
    rate_of: Callable[[str], float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Train with a function that leaves a step's gradients in `parameters` and returns metrics.

    For gradients gathered from micro-batches, or from the workers of a process group (each calls
    this, with torch's generators seeded by its rank as well; metrics must be equal on all).
    `rate_of(name)` multiplies the learning rate of a parameter. A state of this folder is only
    taken up by a run of the same `facts` (JSON values), schedule, seed and parameters.

    Writes `folder`/curves.jsonl (means of the metrics over `log_every` steps), curves.png and, at
    every `checkpoint_every` steps and at the end, the newest state. Metrics stay on the device
    between the lines of the log: a step never waits for it. Raises TrainingError for a state of
    another run and for a metric that is not finite.
    """
    for name, every in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if every < 1:
            raise ValueError(f"{name} must be at least 1, got {every}")
    optimizer = _optimizer(parameters, schedule, rate_of)
    run = {
        "seed": seed,
        "schedule": asdict(schedule),
        "parameters": sorted(parameters),
        "facts": dict(facts or {}),
    }
    start = load_newest(folder, run, parameters, optimizer)
    if start == schedule.steps:
        _LOG.info("%s: all %d steps are done", folder, start)
        return
    if start:
        _LOG.info("%s: going on behind step %d of %d", folder, start, schedule.steps)
    rank, _ = world()
    curves = Curves(folder, start, writes=rank == 0)
    values = list(parameters.values())
    for step in range(start, schedule.steps):
        # Each worker draws noise of its own; a worker alone as it would anywhere.
        torch.manual_seed((step_seed(seed, step) + rank) % 2**63)
        metrics = gradients_of(step)
        norm = clip_gradients(values, schedule.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * group["rate"] * schedule.share(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curves.add({**metrics, "grad_norm": norm})
        done, last = step + 1, step + 1 == schedule.steps
        keeps = done % checkpoint_every == 0 or last
        # Before a state is kept, the log is read: weights that are not numbers are not kept.
        if done % log_every == 0 or keeps:
            curves.write(done, schedule.learning_rate * schedule.share(step))
        if keeps:
            save(folder, done, run, parameters, optimizer)
    curves.draw()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a joint norm; return what it was.

    torch's own, but for parameters of which some are sharded over workers and some are whole.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(whole).square()).sqrt()
    share = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in (*shards, *whole):
        gradient.mul_(share)
    return norm


def _optimizer(
    parameters: Mapping[str, nn.Parameter],
    schedule: Schedule,
    rate_of: Callable[[str], float] | None,
) -> torch.optim.AdamW:
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = schedule.weight_decay if parameter.ndim > 1 else 0.0
        # Sharded parameters and whole ones cannot be in one group: they are updated in one call.
        key = (rate_of(name) if rate_of else 1.0, decay, isinstance(parameter, DTensor))
        groups.setdefault(key, []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": members, "rate": rate, "weight_decay": decay}
        for (rate, decay, _), members in groups.items()
    ]
    return torch.optim.AdamW(
        settings,
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        # One kernel for all parameters of a group, which are many and small in a small model.
        fused=all(parameter.is_cuda for parameter in parameters.values()),
    )
