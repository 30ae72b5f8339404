"""A job as its command line runs it: configuration in, report and exit status out."""

import logging
import sys
from collections.abc import Callable

from pipeline.cli import load
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.report import Report, render


def run_job(action: Callable[[CaptionConfig], Report]) -> int:
    """Run an action of pipeline.run; return 0 at its end, 2 when the user has to mend something."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = load(CaptionConfig, sys.argv[1:])
    try:
        report = action(config)
    except StartupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(render(report) + "\n")
    return 0
