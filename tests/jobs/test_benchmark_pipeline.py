import re

import pytest
import ray

from jobs import benchmark_pipeline
from pipeline.config import PoolsConfig
from pipeline.pools import size_pools


def test_the_quick_benchmark_measures_each_stage_and_the_flow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray.init(address="local", num_cpus=3, include_dashboard=False)
    try:
        benchmark_pipeline.main(["--quick"])
    finally:
        ray.shutdown()
    printed = capsys.readouterr().out
    report, _, table = printed.partition("\n| part | s a video |")
    lines = [line.strip("| ").split("|") for line in table.splitlines()[2:]]
    cells = [[cell.strip() for cell in line] for line in lines]
    measured = {line[0]: float(line[1]) for line in cells if line[1]}
    assert list(measured) == [
        "compress, 1 call at once",
        "compress, 2 calls at once",
        "cache, 1 actors",
        "decode, 2 actors",
        "**all together**, 2 videos in the middle of 4",
    ]
    assert all(seconds > 0 for seconds in measured.values())
    assert all(printed.count(name) == 2 for name in measured), "each when it is known, and again"
    busy = {line[0]: line[3] for line in cells if not line[1]}
    stages = ["decode", "compress", "cache"]
    assert list(busy) == [f"{stage}: busy in the middle" for stage in stages]
    assert all(int(text.split("%")[0]) > 0 for text in busy.values())
    assert "done in this run                    4" in report
    assert re.search(r"held back until the first tokens came: all but one, [1-9]\d* s", report)


@pytest.mark.parametrize(("gpus", "fits"), [(0, True), (1, True), (2, False)])
def test_decoding_is_held_back_only_where_the_other_stages_leave_no_second_decoding_actor(
    monkeypatch: pytest.MonkeyPatch, gpus: int, fits: bool
) -> None:
    resources = {"CPU": 16.0, "GPU": float(gpus)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
    pools = size_pools(PoolsConfig(), answers=False)
    if not fits:
        with pytest.raises(RuntimeError, match=r"take 1 CPUs.* below 0.8 .*CUDA_VISIBLE_DEVICES=0"):
            benchmark_pipeline.cpus_to_hold(pools)
        return
    left = 16 - benchmark_pipeline.cpus_to_hold(pools)
    others = (pools.compress, pools.write_cache, pools.sink)
    needed = sum(pool.actors * pool.cpus for pool in others)
    assert needed + 1 <= left < 2
