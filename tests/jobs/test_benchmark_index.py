"""The benchmarks of indexes refuse figures of a look-up that did not find what they made."""

from pathlib import Path

import pytest

from jobs import benchmark_index, benchmark_night
from pipeline import key_index, spilled_rows


@pytest.mark.parametrize("in_memory", [1 << 22, 100])
def test_everything_that_was_made_is_found(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    in_memory: int,
) -> None:
    monkeypatch.setattr(key_index, "IN_MEMORY", in_memory)
    monkeypatch.setattr(spilled_rows, "IN_MEMORY", in_memory)
    benchmark_index.make_compacted(tmp_path / "cache", 1000)
    benchmark_index.measure(tmp_path / "cache", 1000, "key files")
    benchmark_night.make_night(tmp_path / "output", 500)
    benchmark_night.measure(tmp_path / "output", 500)
    of_keys, of_night = capsys.readouterr().out.splitlines()
    assert of_keys.startswith("| 1,000 | key files | ")
    assert of_night.startswith("| 500 | ")
    with pytest.raises(RuntimeError, match="1000 of 1001"):
        benchmark_index.measure(tmp_path / "cache", 1001, "key files")
    with pytest.raises(RuntimeError, match="501 are answered"):
        benchmark_night.measure(tmp_path / "output", 501)
