"""A job as its command line runs it: configuration in, report and exit status out."""

import logging
import sys
from collections.abc import Callable

from pipeline.cli import load
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.report import Report, render
from pipeline.storage import StorageError


def run_job(action: Callable[[CaptionConfig], Report]) -> int:
    """Run an action of pipeline.run and return the exit status.

    0 at its end, 2 when the user has to mend something, 1 when the store failed the driver.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = load(CaptionConfig, sys.argv[1:])
    try:
        report = action(config)
    except StartupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except StorageError as error:  # of a row it is the row's; this one is of the run's own files
        sys.stderr.write(f"error: {error}; the same command goes on where this run stopped\n")
        return 1
    sys.stdout.write(render(report) + "\n")
    return 0
