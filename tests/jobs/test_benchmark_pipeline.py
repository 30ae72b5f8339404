import pytest
import ray

from jobs import benchmark_pipeline


def test_the_quick_benchmark_measures_each_stage_and_the_flow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        benchmark_pipeline.main(["--quick"])
    finally:
        ray.shutdown()
    printed = capsys.readouterr().out
    table = [line.split("|")[1:] for line in printed.splitlines() if line.startswith("| ")]
    measured = {part.strip(): float(seconds) for part, seconds, *_ in table[1:]}
    assert list(measured) == [
        "compress, 1 call at once",
        "compress, 2 calls at once",
        "cache, 1 actors",
        "decode, 1 actors",
        "**all together**, 2 videos in the middle of 4",
    ]
    assert all(seconds > 0 for seconds in measured.values())
    assert "done in this run                    4" in printed
