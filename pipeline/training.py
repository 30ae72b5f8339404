"""Train OmniSIFT on real data: LLM and selector, in this process or in workers of Ray Train."""

import logging
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

from omnisift.checkpoint import (
    SELECTOR_PREFIX,
    CheckpointError,
    build_selector,
    commit_of,
    load_backbone,
    load_tokenizer,
    read_selector,
    resolve,
)
from omnisift.training.loop import Schedule, train_by_gradients
from omnisift.training.pruned_loss import PrunedLoss
from omnisift.training.publish import publish
from omnisift.training.sharding import gather_gradients, shard
from omnisift.training.state import TrainingError, world
from pipeline.config import TrainConfig
from pipeline.errors import StartupError
from pipeline.run import start_ray
from pipeline.storage import Storage
from pipeline.training_examples import Dealing, Examples
from pipeline.training_lines import Tally, TrainingLines, read_lines

_LOG = logging.getLogger(__name__)


def train_omnisift(config: TrainConfig) -> Path:
    """Train, or go on where `output` stopped; return the folder of the new checkpoint.

    Raises StartupError for what the user has to mend before it begins, TrainingError for what
    stops it: too many unusable lines, a loss that is no number, a state of another run.
    """
    found = read_lines(Storage(config.storage), config.data)
    Tally(config.data, found, config.max_skipped_share, config.workers)
    try:
        source = resolve(config.model, config.revision)
        # Workers on other machines, and a run that goes on, take the commit that is seen here.
        config = replace(config, revision=commit_of(source) or config.revision)
        if config.workers == 1:
            _train_alone(config)
        else:
            _train_on_ray(config)
    except CheckpointError as error:
        raise StartupError(str(error)) from error
    return Path(config.output) / "model"


def _train_alone(config: TrainConfig) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    # A group of one: the same code as with many.
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            _backend(device), init_method=f"file://{folder}/meet", rank=0, world_size=1
        )
        try:
            _train(config, device)
        finally:
            dist.destroy_process_group()


def _train_on_ray(config: TrainConfig) -> None:
    start_ray()
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    uses_gpu = cluster.get("GPU", 0) > 0
    for kind, each in (("CPU", config.worker_cpus), ("GPU", float(uses_gpu))):
        if config.workers * each > cluster.get(kind, 0):
            raise StartupError(
                f"workers={config.workers} need {config.workers * each:g} {kind}s, the cluster has "
                f"{cluster.get(kind, 0):g}; lower workers or worker_cpus, or add nodes"
            )
    output = Path(config.output).resolve()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config, "output": str(output)},
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=uses_gpu,
            resources_per_worker={"CPU": config.worker_cpus, "GPU": int(uses_gpu)},
        ),
        # Ray keeps its own notes there; the states are ours.
        run_config=ray.train.RunConfig(storage_path=str(output), name="ray"),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            for known in (TrainingError, CheckpointError):
                if isinstance(failure, known):
                    raise known(str(failure)) from error
        raise


def _work(settings: dict[str, Any]) -> None:
    """Train as one of Ray Train's workers."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _train(settings["config"], ray.train.torch.get_device(), settings["output"])


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _train(config: TrainConfig, device: torch.device, output: str = "") -> None:
    """Train as a worker of the process group there is."""
    rank, workers = world()
    folder = Path(output or config.output)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    source = resolve(config.model, config.revision)
    loss = _load(config, source, device)
    shard(loss)
    found = read_lines(Storage(config.storage), config.data)
    tally = Tally(config.data, found, config.max_skipped_share, workers)
    try:
        if config.selector_steps:
            _run_stage(config, loss, found, tally, folder / "selector", selecting=True)
        _run_stage(config, loss, found, tally, folder, selecting=False)
    finally:
        if folder.is_dir():
            tally.write(folder / f"skipped-{rank}.jsonl")
    publish(source, folder / "model", loss.trained())


def _run_stage(
    config: TrainConfig,
    loss: PrunedLoss,
    found: TrainingLines,
    tally: Tally,
    folder: Path,
    *,
    selecting: bool,
) -> None:
    """Train the selector alone, as it is to select, or all that is trained."""
    rank, workers = world()
    trained = loss.trained()
    steps, epochs, learning_rate = None, config.epochs, config.learning_rate
    if selecting:
        trained = {name: p for name, p in trained.items() if name.startswith(SELECTOR_PREFIX)}
        steps, learning_rate = config.selector_steps, config.selector_alone_rate
        epochs = math.ceil(steps * config.batch / len(found.lines))
    dealing = Dealing(
        len(found.lines), epochs, config.batch, config.seed, rank=rank, workers=workers
    )
    examples = Examples(config, found.lines, dealing, tally, loss.lay)

    def rate_of(name: str) -> float:
        with_others = name.startswith(SELECTOR_PREFIX) and not selecting
        return config.selector_rate if with_others else 1.0

    try:
        train_by_gradients(
            lambda step: gather_gradients(loss, examples.micro_batches(step), selecting=selecting),
            trained,
            Schedule(
                steps=steps or dealing.num_steps,
                learning_rate=learning_rate,
                warmup_share=config.warmup_share,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
            ),
            folder=folder,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            rate_of=rate_of,
            facts=_facts(config, found),
        )
    finally:
        examples.close()


def _load(config: TrainConfig, source: Path, device: torch.device) -> PrunedLoss:
    backbone = load_backbone(source, device=device)
    weights = read_selector(source, config.compression.selector)
    selector = build_selector(weights, backbone.width, seed=config.seed)
    if not weights.trained:
        _LOG.info("%s has no selector: a new one is trained from seed %d", source, config.seed)
    return PrunedLoss(
        backbone,
        selector,
        load_tokenizer(source),
        config.compression.shares,
        system_prompt=config.system_prompt,
        method=config.compression.method,
        max_tokens=config.max_tokens,
        nominal_timestamps=config.media.timestamps == "nominal",
        gradient_checkpointing=config.gradient_checkpointing,
        exploration=config.exploration,
    )


def _facts(config: TrainConfig, found: TrainingLines) -> dict[str, Any]:
    """Return what a run that goes on must share with the one before, beside the schedule."""
    return {
        "data_sha256": found.sha256,
        "model": config.model,
        "revision": config.revision,
        "batch": config.batch,
        "max_tokens": config.max_tokens,
        "selector_rate": config.selector_rate,
        "exploration": config.exploration,
        "selector_steps": config.selector_steps,
        "selector_alone_rate": config.selector_alone_rate,
        "system_prompt": config.system_prompt,
        "media": asdict(config.media),
        "compression": asdict(config.compression),
    }
