"""Answer a table of questions about videos: `python jobs/answer_questions.py source=q.csv ...`."""

import sys

from pipeline.job import run_job
from pipeline.run import answer_questions

if __name__ == "__main__":
    sys.exit(run_job(answer_questions))
