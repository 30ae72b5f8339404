"""Pools on clusters that are only described."""

import pytest
import ray

from pipeline.config import PoolsConfig
from pipeline.pools import size_pools


@pytest.mark.parametrize(("gpus", "calls"), [(0, 1), (2, 2)])
def test_a_gpu_has_two_calls_to_compute_by_turns(
    monkeypatch: pytest.MonkeyPatch, gpus: int, calls: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": float(gpus)})
    pools = size_pools(PoolsConfig(), answers=False)
    compute = pools.compress.of(4)["compute"]
    assert (compute.min_size, compute.max_size) == (max(1, gpus), max(1, gpus))
    assert compute.max_concurrent_calls_per_actor == calls
    assert compute.enable_true_multi_threading == (calls == 2)
    # as many writers as calls: each hands on a block at a time
    assert pools.write_cache.actors == max(1, gpus) * calls
    for pool in (pools.decode, pools.write_cache, pools.answer, pools.sink):
        assert pool.calls == 1
