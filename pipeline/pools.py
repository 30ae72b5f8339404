"""How many actors each stage gets on this cluster, checked before anything starts."""

import math
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from pipeline.config import PoolsConfig
from pipeline.errors import StartupError

_SPARE_CPUS = 0.2  # for the tasks that read the work list
# Shares of a GPU where a compressing and an answering actor share it. Ray fills a GPU before it
# touches the next: of exact halves two compressors would share one, and compress would have half
# of the GPUs of a node.
_COMPRESS_GPU, _ANSWER_GPU = 0.51, 0.49


@dataclass(frozen=True)
class Pool:
    """The actors of one stage."""

    actors: int
    cpus: float
    gpus: float = 0.0
    calls: int = 1  # of an actor at the same time, in threads

    def overlapping(self, calls: int) -> "Pool":
        """Return this pool with so many calls at a time in each actor."""
        return replace(self, calls=calls)

    def of(self, batch_size: int) -> dict[str, Any]:
        """Return what `Dataset.map_batches` is told: this pool, `batch_size` rows a call."""
        ahead = {"max_tasks_in_flight_per_actor": self.calls + 2} if self.calls > 1 else {}
        return {
            "compute": ActorPoolStrategy(
                size=self.actors,
                max_concurrent_calls_per_actor=self.calls,
                enable_true_multi_threading=self.calls > 1,
                **ahead,  # the next ones travel while these are computed
            ),
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "batch_size": batch_size,
            "batch_format": "pyarrow",
            "zero_copy_batch": True,
        }


@dataclass(frozen=True)
class Pools:
    """The actors of all stages. Sizes are fixed: GPU pools do not grow by themselves."""

    decode: Pool
    compress: Pool
    write_cache: Pool
    read_cache: Pool
    answer: Pool
    answer_alone: Pool  # the same, in a run that has nothing to compress
    sink: Pool

    @property
    def uses_gpu(self) -> bool:
        """Return whether the model computes on GPUs, hence in bfloat16."""
        return self.compress.gpus > 0

    def actors(self, *, fresh: bool, cached: bool) -> dict[str, int]:
        """Return the actors of each stage of the report, for the branches that run."""
        return {
            "decode": self.decode.actors,
            "compress": self.compress.actors,
            "cache": self.write_cache.actors * fresh + self.read_cache.actors * cached,
            "answer": self.answer.actors,
        }


def size_pools(config: PoolsConfig, *, answers: bool = True) -> Pools:
    """Fit the pools into the cluster that Ray is connected to; without `answers` none answers.

    Judged by the nodes that are up: pools do not grow into those that come later. Raises
    StartupError, with the sums, when the smallest pools do not fit: Ray would wait for ever for
    room that never comes.
    """
    nodes = nodes_up()
    cpus, gpus = sum(node[0] for node in nodes), sum(node[1] for node in nodes)
    models = max(1, math.floor(gpus))

    def model_pool(actors: int, cpus: float, gpus_each: float, default: float) -> Pool:
        share = (default if gpus else 0.0) if gpus_each < 0 else gpus_each
        return Pool(actors or models, cpus, share)

    # Never below a half: two compressors on one GPU would leave an answering actor none.
    shared = _COMPRESS_GPU if config.answer_gpus <= _ANSWER_GPU else 0.5
    compress = model_pool(
        config.compress_actors,
        config.compress_cpus,
        config.compress_gpus,
        shared if answers else _alone(config.compress_actors or models, gpus),
    )
    if compress.gpus:  # one call is copied and packed while the GPU computes the other
        compress = replace(compress, calls=2)
    answer = (
        model_pool(config.answer_actors, config.answer_cpus, config.answer_gpus, _ANSWER_GPU)
        if answers
        else Pool(0, 0.0)
    )
    if answers and (compress.gpus > 0) != (answer.gpus > 0):
        raise StartupError(
            f"pools: a compressing actor has {compress.gpus:g} GPUs and an answering one "
            f"{answer.gpus:g}: both compute on GPUs or neither; set both pools.compress_gpus=0 "
            "and pools.answer_gpus=0, or neither"
        )
    needed = sum(pool.actors * pool.gpus for pool in (compress, answer))
    if needed > gpus:
        raise StartupError(
            f"pools: {gpus:g} GPUs are too few: compressing and answering take {needed:g}; "
            "lower pools.compress_actors, pools.answer_actors or their GPUs"
        )
    # zstd and sha256 take a core about as long as a GPU takes for the same tokens
    writers = compress.actors * compress.calls
    cache = Pool(config.cache_actors or writers, config.cache_cpus)
    sink = Pool(1, config.cache_cpus)
    taken = sum(pool.actors * pool.cpus for pool in (compress, answer, cache, cache, sink))
    left = cpus - _SPARE_CPUS - taken
    decode = Pool(
        config.decode_actors or max(1, math.floor(left / config.decode_cpus)), config.decode_cpus
    )
    if decode.actors * decode.cpus > left:
        raise StartupError(
            f"pools: {cpus:g} CPUs are too few: {decode.actors} decoding actors take "
            f"{decode.actors * decode.cpus:g}, the other actors {taken:g}, reading {_SPARE_CPUS:g};"
            " add nodes, or lower pools.decode_actors or a pools.*_cpus"
        )
    _require_a_node(nodes, decode=decode, compress=compress, answer=answer, cache=cache)
    by_default = answer.gpus and config.answer_gpus < 0
    return Pools(
        decode,
        compress,
        write_cache=cache,
        read_cache=cache,
        answer=answer,
        answer_alone=replace(answer, gpus=_alone(answer.actors, gpus)) if by_default else answer,
        sink=sink,
    )


def _alone(actors: int, gpus: float) -> float:
    """Return the share of a GPU that spreads actors evenly where no other pool computes."""
    return 1 / max(1, math.ceil(actors / max(1.0, gpus)))


def nodes_up() -> list[tuple[float, float]]:
    """Return the CPUs and the GPUs of each node that is up."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    up = [node["Resources"] for node in nodes if node["Alive"]]
    return [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in up]


def _require_a_node(nodes: list[tuple[float, float]], **pools: Pool) -> None:
    """Raise StartupError unless one node alone has what an actor takes, for each of the pools."""
    for stage, pool in pools.items():
        if not any(pool.cpus <= cpus and pool.gpus <= gpus for cpus, gpus in nodes):
            takes = f"{pool.cpus:g} CPUs and {pool.gpus:g} GPUs"
            have = ", ".join(f"{cpus:g} and {gpus:g}" for cpus, gpus in sorted(set(nodes)))
            raise StartupError(
                f"pools: an actor of {stage} takes {takes} of one node, and no node has them: the "
                f"nodes have {have}; lower its pools.{stage}_*, or add larger nodes"
            )
