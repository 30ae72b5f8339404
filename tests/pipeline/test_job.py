"""What a job says and how it ends when it cannot go on."""

import sys

import pytest

from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.job import run_job
from pipeline.report import Report
from pipeline.storage import StorageError


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StartupError("output=o: it cannot be read"), 2, "error: output=o: it cannot be read\n"),
        (
            StorageError("storage_error", "s3://b/x: no answer"),
            1,
            "error: s3://b/x: no answer; the same command goes on where this run stopped\n",
        ),
    ],
)
def test_what_ends_a_job_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "source=s", "output=o"])

    def action(config: CaptionConfig) -> Report:
        assert (config.source, config.output) == ("s", "o")
        raise error

    assert run_job(action) == status
    assert capsys.readouterr() == ("", said)


def test_what_is_no_fault_of_a_store_or_a_user_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "source=s", "output=o"])

    def action(_config: CaptionConfig) -> Report:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run_job(action)
