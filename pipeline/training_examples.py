"""The examples of one worker's steps, decoded ahead of them by the decode stage itself."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from omnisift.compressor import Clip, TooLongError
from omnisift.training.loop import step_seed
from omnisift.training.pruned_loss import Example, LaidExample
from pipeline import rows
from pipeline.config import TrainConfig
from pipeline.keys import video_key
from pipeline.manifest import folder_of
from pipeline.stages.decode import Decode
from pipeline.storage import Storage, StorageError
from pipeline.training_lines import Line, Tally, Unusable

_AHEAD = 2  # videos of each decoder, decoded or being decoded


def num_steps(config: TrainConfig, num_lines: int) -> int:
    """Return the steps of all epochs; the last may be a smaller batch."""
    return math.ceil(config.epochs * num_lines / config.batch)


class Examples:
    """Deal the examples of each step to the workers, and decode this worker's.

    The order is a permutation of the lines for each epoch, from the seed: a run that resumes sees
    what it would have seen.
    """

    def __init__(
        self,
        config: TrainConfig,
        lines: Sequence[Line],
        tally: Tally,
        lay: Callable[[Example], LaidExample],
        *,
        rank: int,
        workers: int,
    ) -> None:
        self._config, self._lines, self._tally, self._lay = config, lines, tally, lay
        self._rank, self._workers = rank, workers
        self._storage = Storage(config.storage)
        self._decoders = [
            Decode(config.media, config.decode, config.storage) for _ in range(config.decoders)
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
            steps = range(step, num_steps(self._config, len(self._lines)))
            self._coming = (line for later in steps for line in self._mine(later))
        self._next_step = step + 1
        left = len(self._mine(step))
        for _ in range(math.ceil(self._largest(step) / self._config.micro_batch)):
            taken = min(left, self._config.micro_batch)
            left -= taken
            found = [self._take() for _ in range(taken)]
            yield [laid for laid in found if laid is not None]

    def _places(self, step: int) -> range:
        end = self._config.epochs * len(self._lines)
        return range(step * self._config.batch, min((step + 1) * self._config.batch, end))

    def _largest(self, step: int) -> int:
        """Return the examples of the worker that has most of a step's."""
        return math.ceil(len(self._places(step)) / self._workers)

    def _mine(self, step: int) -> list[Line]:
        mine = []
        for number in self._places(step)[self._rank :: self._workers]:
            epoch, place = divmod(number, len(self._lines))
            order = _order(self._config.seed, epoch, len(self._lines))
            mine.append(self._lines[order[place]])
        return mine

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
        [decoded] = rows.iterate(decoder(rows.build([row], rows.IDENTITY)))
        return decoded


@lru_cache(maxsize=2)  # a step, or what is decoded ahead, may lie in two epochs
def _order(seed: int, epoch: int, num_lines: int) -> list[int]:
    generator = torch.Generator().manual_seed(step_seed(seed, epoch))
    order: list[int] = torch.randperm(num_lines, generator=generator).tolist()
    return order


def _clip(row: dict[str, Any]) -> Clip:
    frames = torch.from_numpy(np.frombuffer(row["frames"], np.uint8).copy())
    audio = np.frombuffer(row["audio"], np.float32).copy()
    return Clip(
        frames=frames.view(row["frames_shape"]), audio=torch.from_numpy(audio), fps=row["fps"]
    )
