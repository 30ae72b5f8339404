"""Fill the token cache alone: `python jobs/compress_corpus.py source=... output=... model=...`."""

import logging
import sys

from pipeline.cli import load
from pipeline.config import CaptionConfig
from pipeline.errors import StartupError
from pipeline.report import render
from pipeline.run import compress_corpus


def main() -> int:
    """Run the job; return 0 when it ran to its end, 2 when the user has to mend something."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = load(CaptionConfig, sys.argv[1:])
    try:
        report = compress_corpus(config)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
