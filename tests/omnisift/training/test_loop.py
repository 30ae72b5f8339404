"""The loop: its schedule, its optimiser, its curves, and that a killed run resumes exactly."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from omnisift.training.curves import read_curves
from omnisift.training.loop import Schedule, step_seed, train, train_by_gradients
from omnisift.training.state import TrainingError, states
from tests.omnisift.training.loop_worker import run

ROOT = Path(__file__).parents[3]


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = read_curves(folder / "curves.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    run(tmp_path / "unbroken", -1)
    broken = tmp_path / "broken"
    script = ["-m", "tests.omnisift.training.loop_worker", str(broken), "9"]
    killed = subprocess.run([sys.executable, *script], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in states(broken)] == ["state-5"]
    assert [line["step"] for line in _lines(broken)] == [2, 4, 5, 6, 8]
    run(broken, -1)

    [one], [other] = states(tmp_path / "unbroken"), states(broken)
    assert one.name == other.name == "state-12"
    expected, got = (load_file(state / "worker-0.safetensors") for state in (one, other))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert _lines(tmp_path / "unbroken") == _lines(broken)
    assert (broken / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # Nothing is left to do, so nothing is done.
    before = (other / "run.json").stat().st_mtime_ns
    run(broken, 0)
    assert (other / "run.json").stat().st_mtime_ns == before


def _fit(
    folder: Path, weight: nn.Parameter, schedule: Schedule, seed: int = 0, **more: Any
) -> None:
    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (weight - step).square().sum(), {}

    train(loss_of, {"w": weight}, schedule, folder=folder, seed=seed, **more)


def test_the_schedule_is_transformers_cosine_one_step_later() -> None:
    schedule = Schedule(steps=40, learning_rate=1.0, warmup_share=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = get_cosine_schedule_with_warmup(optimizer, 5, 41)
    for step in range(40):
        optimizer.step()
        oracle.step()
        expected = oracle.get_last_lr()[0]
        # 41 steps with 5 of warm-up leave as many for the cosine as 40 with 4.
        assert schedule.share(step) == pytest.approx(expected, abs=1e-12)
    floored = Schedule(steps=40, learning_rate=1.0, floor_share=0.1)
    assert 0.1 < floored.share(39) < 0.11
    assert floored.share(2) == 1.0


def test_updates_are_those_of_plain_adamw(tmp_path: Path) -> None:
    """Against the update rule of the paper (arXiv 1711.05101), by hand, with clipping."""
    schedule = Schedule(steps=6, learning_rate=0.1, weight_decay=0.2, max_grad_norm=0.5)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))
    by_hand = weight.detach().double()
    _fit(tmp_path, weight, schedule, checkpoint_every=6, rate_of=lambda _: 0.5)
    first, second = torch.zeros_like(by_hand), torch.zeros_like(by_hand)
    for step in range(6):
        gradient = 2 * (by_hand - step)
        gradient = gradient * min(1.0, 0.5 / float(gradient.norm()))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = 0.1 * 0.5 * schedule.share(step)
        by_hand = by_hand * (1 - rate * 0.2)
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        by_hand = by_hand - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), by_hand, atol=1e-6, rtol=1e-6)


def test_curves_hold_means_between_their_lines(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(1))
    seen = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (weight - step).square().sum()
        seen.append(float(loss.detach()))
        return loss, {"accuracy_seen": torch.tensor(step)}

    schedule = Schedule(steps=7, learning_rate=0.1)
    train(
        loss_of, {"w": weight}, schedule, folder=tmp_path, seed=0, checkpoint_every=7, log_every=3
    )
    lines = read_curves(tmp_path / "curves.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["accuracy_seen"] for line in lines] == [1, 4, 6]
    means = [sum(seen[0:3]) / 3, sum(seen[3:6]) / 3, seen[6]]
    assert [line["loss"] for line in lines] == pytest.approx(means)


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_kept(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(1))

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (weight * (float("nan") if step == 3 else 1.0)).sum(), {}

    with pytest.raises(TrainingError, match="loss, grad_norm not finite in steps 3 to 4"):
        train(
            loss_of,
            {"w": weight},
            Schedule(steps=8, learning_rate=0.1),
            folder=tmp_path,
            seed=0,
            checkpoint_every=2,
            log_every=8,
        )
    assert [path.name for path in states(tmp_path)] == ["state-2"]


def _other_shape(folder: Path) -> None:
    file = folder / "state-2" / "worker-0.safetensors"
    save_file(load_file(file) | {"exp_avg/w": torch.zeros(9)}, file)


def _other_workers(folder: Path) -> None:
    file = folder / "state-2" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"workers": 4}))


def _cut(folder: Path) -> None:
    file = folder / "state-2" / "worker-0.safetensors"
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("spoil", "seed", "message"),
    [
        (lambda _: None, 1, "made by a run with seed 0, this one has 1"),
        (_other_workers, 0, "made by a run with workers 4, this one has 1"),
        (_other_shape, 0, r"tensor exp_avg/w: expected \[2\], got \[9\]"),
        (_cut, 0, "state-2: the state cannot be read"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], seed: int, message: str
) -> None:
    schedule = Schedule(steps=2, learning_rate=0.1)
    _fit(tmp_path, nn.Parameter(torch.zeros(2)), schedule, checkpoint_every=2)
    spoil(tmp_path)
    with pytest.raises(TrainingError, match=message):
        _fit(tmp_path, nn.Parameter(torch.zeros(2)), schedule, seed, checkpoint_every=2)


def test_each_worker_draws_noise_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, list[Tensor]] = {}
    for rank in range(3):
        monkeypatch.setattr("omnisift.training.loop.world", lambda rank=rank: (rank, 3))
        weight = nn.Parameter(torch.zeros(1))

        def gradients_of(_step: int, rank: int = rank, weight: nn.Parameter = weight) -> Any:
            drawn.setdefault(rank, []).append(torch.randn(4))
            weight.grad = torch.ones(1)
            return {}

        train_by_gradients(
            gradients_of,
            {"w": weight},
            Schedule(steps=3, learning_rate=0.1),
            folder=tmp_path / str(rank),
            seed=5,
            checkpoint_every=3,
        )
    for step in range(3):
        torch.manual_seed(step_seed(5, step))
        assert torch.equal(drawn[0][step], torch.randn(4))  # as a run of one worker
    every = torch.cat([torch.stack(steps) for steps in drawn.values()])
    assert len(every.unique()) == 3 * 3 * 4


def test_seeds_of_steps_do_not_repeat() -> None:
    seeds = {step_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("learning_rate", 0.0), ("warmup_share", 1.0), ("max_grad_norm", 0.0)],
)
def test_a_schedule_refuses_nonsense(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Schedule(**{"steps": 1, "learning_rate": 0.1, field: value})  # type: ignore[arg-type]
