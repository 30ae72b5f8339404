"""The examples of one worker's steps, decoded ahead of them by the decode stage itself."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from omnisift.compressor import Clip, TooLongError
from omnisift.training.loop import step_seed
from omnisift.training.pruned_loss import Example, LaidExample
from pipeline import rows
from pipeline.boundary import ANYWHERE
from pipeline.config import TrainConfig
from pipeline.keys import video_key
from pipeline.manifest import folder_of
from pipeline.stages.decode import Decode
from pipeline.storage import Storage, StorageError
from pipeline.training_lines import Line, Tally, Unusable

_AHEAD = 2  # videos of each decoder, decoded or being decoded


@dataclass(frozen=True)
class Dealing:
    """Which lines each worker has in each step: a permutation of them for each epoch.

    Which lines are a step's depends on the seed alone, so a run that resumes sees what it would
    have seen, and another number of workers sees the same.
    """

    num_lines: int
    epochs: int
    batch: int
    seed: int
    rank: int = 0
    workers: int = 1

    @property
    def num_steps(self) -> int:
        """Return the steps of all epochs; the last may be a smaller batch."""
        return math.ceil(self.epochs * self.num_lines / self.batch)

    def largest(self, step: int) -> int:
        """Return the examples of the worker that has most of a step's."""
        return math.ceil(len(self._places(step)) / self.workers)

    def mine(self, step: int) -> list[int]:
        """Return the indices of this worker's lines."""
        places = self._places(step)[self.rank :: self.workers]
        epochs = (divmod(place, self.num_lines) for place in places)
        return [_order(self.seed, epoch, self.num_lines)[place] for epoch, place in epochs]

    def _places(self, step: int) -> range:
        end = self.epochs * self.num_lines
        return range(step * self.batch, min((step + 1) * self.batch, end))


@lru_cache(maxsize=2)  # a step, or what is decoded ahead, may lie in two epochs
def _order(seed: int, epoch: int, num_lines: int) -> list[int]:
    generator = torch.Generator().manual_seed(step_seed(seed, epoch))
    order: list[int] = torch.randperm(num_lines, generator=generator).tolist()
    return order


class Examples:
    """Decode the examples of a worker's steps, in their order, a few videos ahead."""

    def __init__(
        self,
        config: TrainConfig,
        lines: Sequence[Line],
        dealing: Dealing,
        tally: Tally,
        lay: Callable[[Example], LaidExample],
    ) -> None:
        self._config, self._lines, self._dealing = config, lines, dealing
        self._tally, self._lay = tally, lay
        self._storage = Storage(config.storage)
        self._decoders = [
            Decode(config.media, config.decode, config.storage, ANYWHERE)
            for _ in range(config.decoders)
        ]
        # A thread for each: it waits for the child process that decodes.
        self._threads = [ThreadPoolExecutor(max_workers=1) for _ in self._decoders]
        self._ahead: deque[tuple[Line, Future[dict[str, Any]]]] = deque()
        self._coming: Iterator[Line] = iter(())
        self._next_step = -1

    def close(self) -> None:
        """End the decoding processes."""
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    def micro_batches(self, step: int) -> Iterator[list[LaidExample]]:
        """Yield as many micro-batches as every other worker; what is unusable is left out."""
        if step != self._next_step:  # the first step, or a resumed one
            self._ahead.clear()
            steps = range(step, self._dealing.num_steps)
            self._coming = (self._lines[i] for later in steps for i in self._dealing.mine(later))
        self._next_step = step + 1
        left = len(self._dealing.mine(step))
        for _ in range(math.ceil(self._dealing.largest(step) / self._config.micro_batch)):
            taken = min(left, self._config.micro_batch)
            left -= taken
            found = [self._take() for _ in range(taken)]
            yield [laid for laid in found if laid is not None]

    def _take(self) -> LaidExample | None:
        """Return the next example, laid out; None for a line that cannot be used."""
        self._look_ahead()
        line, future = self._ahead.popleft()
        row = future.result()
        self._look_ahead()
        if row["error_type"] is not None:
            self._skip(line, row["error_type"], row["error_message"])
            return None
        example = Example(_clip(row), line.prompt, line.answer, row["video_key"])
        try:
            return self._lay(example)
        except TooLongError as error:
            self._skip(line, "too_long", f"{line.video}: {error}")
            return None

    def _skip(self, line: Line, error_type: str, message: str) -> None:
        place = f"{self._config.data}#line {line.number}"
        self._tally.add(Unusable(line.number, error_type, f"{place}: {message}"))

    def _look_ahead(self) -> None:
        while len(self._ahead) < _AHEAD * len(self._decoders):
            line = next(self._coming, None)
            if line is None:
                return
            turn = line.number % len(self._decoders)
            thread, decoder = self._threads[turn], self._decoders[turn]
            self._ahead.append((line, thread.submit(self._decode, line, decoder)))

    def _decode(self, line: Line, decoder: Decode) -> dict[str, Any]:
        try:
            info = self._storage.stat(line.video)
        except StorageError as error:
            return {"error_type": error.error_type, "error_message": str(error)}
        row = {
            "video_key": video_key(info, root=folder_of(self._config.data)),
            "uri": line.video,
            "size_bytes": info.size_bytes,
            "etag": info.etag,
        }
        [whole] = rows.iterate(rows.build([row], rows.IDENTITY))
        [decoded] = decoder.decode(whole)
        return decoded


def _clip(row: dict[str, Any]) -> Clip:
    frames = torch.from_numpy(np.frombuffer(row["frames"], np.uint8).copy())
    audio = np.frombuffer(row["audio"], np.float32).copy()
    return Clip(
        frames=frames.view(row["frames_shape"]), audio=torch.from_numpy(audio), fps=row["fps"]
    )
