"""One worker of a process group, as a script: train a few steps, publish.

Arguments: rank, workers, folder, model, and `select` or nothing.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from omnisift.checkpoint import build_selector, load_backbone, load_tokenizer, read_selector
from omnisift.compress import drop_shares
from omnisift.compressor import Clip
from omnisift.training.loop import Schedule, train_by_gradients
from omnisift.training.pruned_loss import Example, LaidExample, PrunedLoss
from omnisift.training.publish import publish
from omnisift.training.sharding import gather_gradients, shard

BATCH = 4
STEPS = 4


def example(number: int) -> Example | None:
    """Return an example of unequal length; none for one that cannot be read."""
    if number == 6:
        return None
    generator = torch.Generator().manual_seed(number)
    shape = (2 + 2 * (number % 3), 56, 56 + 28 * (number % 2), 3)
    clip = Clip(
        frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        audio=torch.randn(0 if number % 4 == 3 else 30_000, generator=generator) * 0.1,
        fps=2.0,
    )
    return Example(clip, "What?", "word " * (1 + number % 3))


def run(
    rank: int,
    workers: int,
    folder: Path,
    model: Path,
    *,
    stop_at: int = STEPS,
    device: str = "cpu",
    select: bool = False,
) -> None:
    """Train `STEPS` steps on the examples 0, 1, ..., those of a batch dealt to the workers.

    With `select` the selector's gradient of two selections is kept as well, before and behind.
    """
    backbone = load_backbone(model, device=device)
    selector = build_selector(read_selector(model), backbone.width, seed=1)
    loss = PrunedLoss(
        backbone,
        selector,
        load_tokenizer(model),
        drop_shares(0.25),
        system_prompt="See and hear.",
        gradient_checkpointing=True,
    )
    shard(loss)

    def laid(step: int) -> list[list[LaidExample]]:
        mine = range(step * BATCH + rank, (step + 1) * BATCH, workers)
        found = [example(number) for number in mine]
        return [[loss.lay(one)] if one is not None else [] for one in found]

    def keep_pull(name: str) -> None:
        loss.exploration = 0.1
        # The second batch: one of its examples cannot be read.
        metrics = gather_gradients(loss, laid(1), selecting=True)
        loss.exploration = 0.0
        pull = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
        save_file({**pull, "loss": metrics["loss"]}, folder / f"{name}-{rank}.safetensors")
        loss.zero_grad(set_to_none=True)

    def gradients_of(step: int) -> dict[str, torch.Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        return gather_gradients(loss, laid(step))

    if select:
        folder.mkdir(exist_ok=True)
        keep_pull("before")
    train_by_gradients(
        gradients_of,
        loss.trained(),
        Schedule(steps=STEPS, learning_rate=3e-3, max_grad_norm=0.5),
        folder=folder,
        seed=0,
        checkpoint_every=2,
        log_every=1,
    )
    if select:
        keep_pull("behind")
    publish(model, folder / "model", loss.trained())


def main() -> None:
    """Join the group and run."""
    torch.set_num_threads(1)
    rank, workers = int(sys.argv[1]), int(sys.argv[2])
    folder, model = Path(sys.argv[3]), Path(sys.argv[4])
    meet = f"file://{folder.with_suffix('.meet')}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    run(rank, workers, folder, model, select="select" in sys.argv[5:])
    dist.barrier()
    dist.destroy_process_group()
    # All is written. gloo's threads abort an interpreter that ends under them now and then
    # ("terminate called without an active exception"), which is not what is tested.
    os._exit(0)


if __name__ == "__main__":
    main()
