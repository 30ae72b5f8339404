"""Show what a corpus was answered: `python jobs/show_answers.py output=s3://...`."""

import sys
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.answers import read_answers
from pipeline.cli import load
from pipeline.config import ShowConfig
from pipeline.errors import StartupError
from pipeline.storage import Storage, StorageError


def choose(answers: pa.Table, config: ShowConfig) -> pa.Table:
    """Keep the rows whose columns have the values asked for."""
    for column, value in (
        ("status", config.status),
        ("run_id", config.run),
        ("prompt", config.prompt),
    ):
        if value:
            answers = answers.filter(pc.equal(answers.column(column), value))
    order = ("uri", "start_s", "prompt_id")
    return answers.sort_by([(column, "ascending") for column in order])


def printable(text: str) -> str:
    """Return text on one line, control characters and broken UTF-8 shown as dots."""
    return "".join(c if c.isprintable() and c != "\ufffd" else "." for c in text)


def span(row: dict[str, Any]) -> str:
    """Return which seconds of its video a row is about, where it is not all of it."""
    if row["start_s"] is None:
        return ""
    end = "" if row["end_s"] is None else f"{row['end_s']:g} s"
    return f"  {row['start_s']:g} s to {end}".rstrip()


def main() -> int:
    """Print two lines for each answer: the video or its window, and its text or its error."""
    config = load(ShowConfig, sys.argv[1:])
    try:
        answers = choose(read_answers(config.output, Storage(config.storage)), config)
    except (StartupError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in answers.slice(0, config.limit).to_pylist():
        print(row["uri"] + span(row))
        if row["status"] == "ok":
            print(f"    {printable(row['text'])}")
        else:
            print(f"    {row['error_type']} in {row['error_stage']}: {row['error_message']}")
    print(f"{min(answers.num_rows, config.limit)} of {answers.num_rows} answers shown")
    return 0


if __name__ == "__main__":
    sys.exit(main())
