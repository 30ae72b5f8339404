"""What a run that only compresses has left to do."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.answer_index import AnswerIndex, Ask
from pipeline.token_cache import CacheIndex


class CompressionIndex:
    """Stand in for AnswerIndex where nothing is asked: a video is done when its tokens are cached.

    Failures are known as everywhere, from the rows of earlier runs.
    """

    def __init__(self, done: AnswerIndex, cached: CacheIndex) -> None:
        self._cached = cached
        self.given_up = done.given_up
        self.ask_given_up = done.ask_given_up
        self.attempts = done.attempts
        self.has_failed = done.has_failed

    def answered(self, asks: Sequence[Ask]) -> npt.NDArray[np.bool_]:
        """Say for each question whether the video has its tokens."""
        places = self._cached.locate([video_key for video_key, *_ in asks])
        return np.array([place is not None for place in places], np.bool_)


Done = AnswerIndex | CompressionIndex
