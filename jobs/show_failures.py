"""Show the failures of an output: `python jobs/show_failures.py output=s3://... [run=RUN_ID]`."""

import sys

import pyarrow.compute as pc

from pipeline.answers import read_answers
from pipeline.config import StorageConfig
from pipeline.errors import StartupError
from pipeline.storage import Storage, StorageError


def main(arguments: list[str]) -> int:
    """Print a line of error_type, uri and message for each failed answer; tabs between."""
    settings = dict(argument.partition("=")[::2] for argument in arguments)
    if "output" not in settings or set(settings) - {"output", "run", "endpoint_url"}:
        print(f"{__doc__} endpoint_url=http://... for a store that is not Amazon's")
        return 2
    storage = Storage(StorageConfig(endpoint_url=settings.get("endpoint_url", "")))
    try:
        answers = read_answers(settings["output"], storage)
    except (StartupError, StorageError) as error:
        print(error, file=sys.stderr)
        return 2
    failed = answers.filter(pc.equal(answers.column("status"), "failed"))
    if run := settings.get("run"):
        failed = failed.filter(pc.equal(failed.column("run_id"), run))
    for row in failed.select(["error_type", "uri", "error_message"]).to_pylist():
        print("\t".join(str(value) for value in row.values()))
    print(f"{failed.num_rows} failed answers", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
