import os
import sys
from pathlib import Path

import pytest

from pipeline.testing.own_process import in_own_process, peak_memory_gib


def _note_process(file: Path) -> None:
    file.write_text(str(os.getpid()))


def test_what_is_measured_runs_elsewhere_and_its_end_is_awaited(tmp_path: Path) -> None:
    file = tmp_path / "process"
    in_own_process(_note_process, file)
    assert int(file.read_text()) != os.getpid()


def test_a_measurement_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        in_own_process(sys.exit, 3)


def test_the_peak_is_what_the_system_says() -> None:
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_memory_gib() == pytest.approx(kibibytes / 2**20, rel=0.05)
