"""Read what to learn: a JSONL of video, prompt and answer, and keep count of what is unusable."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omnisift.training.state import TrainingError
from pipeline.errors import StartupError
from pipeline.keys import plain, without_credentials
from pipeline.manifest import folder_of
from pipeline.storage import S3, Storage, StorageError, join

_LOG = logging.getLogger(__name__)
_FIELDS = ("video", "prompt", "answer")
_NAMED = 5  # unusable lines that an error lists


@dataclass(frozen=True)
class Line:
    """A line of the data."""

    number: int  # from 1
    video: str  # uri
    prompt: str
    answer: str


@dataclass(frozen=True)
class Unusable:
    """A line that nothing can be learned from."""

    line: int
    error_type: str  # "broken_line", or as in the pipeline's rows
    message: str


@dataclass(frozen=True)
class TrainingLines:
    """The data: usable lines, broken ones, and the hash of the file."""

    lines: list[Line]
    broken: list[Unusable]
    sha256: str


def read_lines(storage: Storage, data: str) -> TrainingLines:
    """Read a JSONL file; a video without a scheme is a path beside it.

    Raises StartupError where the file cannot be read or holds no usable line.
    """
    try:
        content = storage.read(data)
    except StorageError as error:
        raise StartupError(f"data={data}: it cannot be read: {error}") from error
    lines: list[Line] = []
    broken: list[Unusable] = []
    for number, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        line = _line(number, text, folder_of(data))
        if isinstance(line, Line):
            lines.append(line)
        else:
            broken.append(Unusable(number, "broken_line", f"{data}#line {number}: {line}"))
    if not lines:
        why = f"the first: {broken[0].message}" if broken else "the file is empty"
        raise StartupError(f"data={data}: there is no line to learn from; {why}")
    return TrainingLines(lines, broken, hashlib.sha256(content).hexdigest())


def _line(number: int, text: bytes, folder: str) -> Line | str:
    """Return a line, or what is wrong with it."""
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    if not isinstance(record, dict):
        return "it is not a JSON object"
    for name in _FIELDS:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"{name} must be text, got {value!r:.60}"
    video = record["video"]
    if video != without_credentials(video):
        return "its video holds credentials; give them in the environment"
    if "://" in video and not video.startswith((S3, "file://")):
        return f"its video is {video!r:.60}; s3:// and local paths are read"
    if "://" not in video and not video.startswith("/"):
        video = join(folder, video)
    return Line(number, plain(video), record["prompt"], record["answer"])


class Tally:
    """The unusable lines that a worker met; past the limit, training stops."""

    def __init__(self, data: str, found: TrainingLines, max_share: float, workers: int) -> None:
        """Raise TrainingError where the broken lines alone are too many."""
        self._data, self._max_share = data, max_share
        self._total = len(found.lines) + len(found.broken)
        self._lines = {entry.line: entry for entry in found.broken}
        self._broken, self._workers = len(self._lines), workers
        self.check()

    def add(self, entry: Unusable) -> None:
        """Count a line, once, whatever the number of epochs."""
        if entry.line not in self._lines:
            self._lines[entry.line] = entry
            _LOG.warning("skipped (%s): %s", entry.error_type, entry.message)
            self.check()

    def check(self) -> None:
        """Raise TrainingError past the limit, for which a worker answers in its share."""
        met = len(self._lines) - self._broken
        if self._broken + met * self._workers <= self._max_share * self._total:
            return
        entries = list(self._lines.values())
        named = "; ".join(f"{e.message} ({e.error_type})" for e in entries[:_NAMED])
        more = f"; and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
        raise TrainingError(
            f"data={self._data}: {len(entries)} of {self._total} lines cannot be used, more than "
            f"max_skipped_share={self._max_share:g} allows: {named}{more}; mend them, take them "
            "out, or raise max_skipped_share"
        )

    def write(self, file: Path) -> None:
        """Write the lines, one JSON object each."""
        entries = (self._lines[line] for line in sorted(self._lines))
        file.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries))
