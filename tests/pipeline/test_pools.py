"""Pools on clusters that are only described."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.config import PoolsConfig
from pipeline.errors import StartupError
from pipeline.pools import size_pools


def describe(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[int, int]) -> None:
    """Let Ray know nodes of so many CPUs and GPUs, and a large one that is gone."""
    up = [
        {"Alive": True, "Resources": {"memory": 1e9} | ({"CPU": cpus} if cpus else {}) | gpu}
        for cpus, gpus in nodes
        for gpu in [{"GPU": float(gpus)} if gpus else {}]
    ]
    gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*up, gone])


@pytest.mark.parametrize(("gpus", "calls"), [(0, 1), (2, 2)])
def test_a_gpu_has_two_calls_to_compute_by_turns(
    monkeypatch: pytest.MonkeyPatch, gpus: int, calls: int
) -> None:
    describe(monkeypatch, (16, gpus))
    pools = size_pools(PoolsConfig(), answers=False)
    compute = pools.compress.of(4)["compute"]
    assert (compute.min_size, compute.max_size) == (max(1, gpus), max(1, gpus))
    assert compute.max_concurrent_calls_per_actor == calls
    assert compute.enable_true_multi_threading == (calls == 2)
    # as many writers as calls: each hands on a block at a time
    assert pools.write_cache.actors == max(1, gpus) * calls
    for pool in (pools.decode, pools.write_cache, pools.answer, pools.sink):
        assert pool.calls == 1


HEAD = (0, 0)
FOUR_CARDS = (HEAD, *[(16, 1)] * 4)
GPUS_APART = (HEAD, (4, 0), (1, 4))  # CPUs enough and GPUs enough, not on one node


@pytest.mark.parametrize(
    ("nodes", "keys", "stage", "takes"),
    [
        (
            FOUR_CARDS,
            {"answer_gpus": 2.0, "answer_actors": 1, "compress_actors": 2},
            "answer",
            "0.25 CPUs and 2 GPUs",
        ),
        ([(2, 0), (2, 0)], {"decode_cpus": 3.0}, "decode", "3 CPUs and 0 GPUs"),
        (
            GPUS_APART,
            {"compress_cpus": 1.5, "compress_actors": 1, "answer_actors": 1, "decode_actors": 1},
            "compress",
            "1.5 CPUs and 0.51 GPUs",
        ),
        ([(2, 0)] * 8, {"cache_cpus": 2.5}, "cache", "2.5 CPUs and 0 GPUs"),
    ],
)
def test_an_actor_that_no_node_can_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[tuple[int, int]],
    keys: dict[str, Any],
    stage: str,
    takes: str,
) -> None:
    describe(monkeypatch, *nodes)
    with pytest.raises(StartupError, match=rf"pools: an actor of {stage} takes {takes} of one"):
        size_pools(PoolsConfig(**keys))
    # the same sums on one node: what was missing is the node
    describe(monkeypatch, (sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes)))
    size_pools(PoolsConfig(**keys))


@pytest.mark.parametrize(
    ("nodes", "keys"),
    [
        # docs/engines.md: three groups of two GPUs, two GPUs for compressing
        (
            [(64, 8)],
            {"answer_gpus": 2.0, "answer_actors": 3, "compress_gpus": 1.0, "compress_actors": 2},
        ),
        # docs/operations.md: two compressors on each GPU
        (FOUR_CARDS, {"compress_gpus": 0.34, "answer_gpus": 0.32, "compress_actors": 8}),
        # GPUs of their own for answers
        ([(64, 4)], {"answer_gpus": 2.0, "answer_actors": 1, "compress_actors": 4}),
    ],
)
def test_what_the_documents_advise_is_accepted(
    monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]], keys: dict[str, Any]
) -> None:
    describe(monkeypatch, *nodes)
    pools = size_pools(PoolsConfig(**keys))
    assert pools.compress.actors == keys["compress_actors"]


@pytest.mark.parametrize("only", ["compress_gpus", "answer_gpus"])
def test_the_models_compute_on_gpus_together_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, only: str
) -> None:
    keys: dict[str, Any] = {only: 0.0}
    describe(monkeypatch, (16, 1))
    with pytest.raises(StartupError, match=r"both pools\.compress_gpus=0 and pools\.answer_gpus=0"):
        size_pools(PoolsConfig(**keys))
    without = size_pools(PoolsConfig(compress_gpus=0.0, answer_gpus=0.0))
    assert not without.uses_gpu
    assert without.answer.of(1)["num_gpus"] is None
    # who only compresses has no answering actor to agree with
    assert size_pools(PoolsConfig(**keys), answers=False).uses_gpu == (only == "answer_gpus")
    # where there is no GPU, none is what both have anyway
    describe(monkeypatch, (16, 0))
    assert not size_pools(PoolsConfig(**keys)).uses_gpu


# Actors as the plan starts them, on GPUs that Ray is told of; prints the GPUs of each stage.
PLACE = """
import json, sys, ray
from pipeline.config import PoolsConfig
from pipeline.pools import size_pools
ray.init(address="local", num_cpus=8, num_gpus=3, include_dashboard=False, logging_level="ERROR")

@ray.remote
class Actor:
    def gpus(self):
        return ray.get_gpu_ids()

stages, keys = sys.argv[1].split(), json.loads(sys.argv[2])
pools = size_pools(PoolsConfig(**keys), answers=stages != ["compress"])
actors, found = [], {}
for stage in stages:
    pool = getattr(pools, stage)
    own = [Actor.options(num_cpus=pool.cpus, num_gpus=pool.gpus) for _ in range(pool.actors)]
    actors.append([actor.remote() for actor in own])
    gpus = ray.get([actor.gpus.remote() for actor in actors[-1]])
    found[stage] = sorted(gpu for own in gpus for gpu in own)
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("keys", "each"),
    [
        ({}, {"compress": 1, "answer": 1}),
        ({}, {"compress": 1}),
        ({"compress_actors": 6}, {"compress": 2}),
        ({}, {"answer_alone": 1}),
        # docs/operations.md: two compressors on each GPU
        (
            {"compress_gpus": 0.34, "answer_gpus": 0.32, "compress_actors": 6},
            {"compress": 2, "answer": 1},
        ),
    ],
)
def test_every_gpu_of_a_node_is_used(keys: dict[str, Any], each: dict[str, int]) -> None:
    """Ray fills a GPU before it touches the next, so of two halves two compressors shared one."""
    done = subprocess.run(
        [sys.executable, "-c", PLACE, " ".join(each), json.dumps(keys)],
        cwd=Path(__file__).parents[2],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {stage: sorted([0, 1, 2] * times) for stage, times in each.items()}


@pytest.mark.parametrize(
    ("keys", "compress", "answer"),
    [
        ({}, 0.51, 0.49),
        ({"answer_gpus": 0.5}, 0.5, 0.5),
        ({"answer_gpus": 0.3}, 0.51, 0.3),
        ({"compress_gpus": 0.25}, 0.25, 0.49),
    ],
)
def test_what_one_takes_of_a_gpu_the_other_has_not(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], compress: float, answer: float
) -> None:
    describe(monkeypatch, (16, 1))
    pools = size_pools(PoolsConfig(**keys))
    assert (pools.compress.gpus, pools.answer.gpus) == (compress, answer)


def test_an_answering_actor_above_a_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compressors of 0.4 would be on one of two GPUs, and the second answer would find none."""
    describe(monkeypatch, (16, 2))
    with pytest.raises(StartupError, match=r"2 GPUs are too few: .* take 2\.2"):
        size_pools(PoolsConfig(answer_gpus=0.6))
