"""Caption a corpus of videos: `python jobs/caption_corpus.py source=... output=... model=...`."""

import sys

from pipeline.job import run_job
from pipeline.run import caption_corpus

if __name__ == "__main__":
    sys.exit(run_job(caption_corpus))
