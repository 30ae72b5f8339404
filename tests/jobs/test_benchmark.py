import pytest

from jobs import benchmark


def test_the_quick_benchmark_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--quick"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    for part in (
        "compression",
        "one more chunk",
        "video tower",
        "audio tower",
        "prefill",
        "3 questions",
    ):
        assert any(row.startswith(f"| {part}") for row in rows), part
    assert all("100.0000%" in row for row in rows if "of decisions alike" in row)
