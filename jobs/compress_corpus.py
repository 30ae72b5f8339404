"""Fill the token cache alone: `python jobs/compress_corpus.py source=... output=... model=...`."""

import sys

from pipeline.job import run_job
from pipeline.run import compress_corpus

if __name__ == "__main__":
    sys.exit(run_job(compress_corpus))
