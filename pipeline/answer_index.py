"""What earlier runs have answered or given up, looked up by question."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import key_index, rows
from pipeline.answers import find_files, is_answers
from pipeline.parquet import UNREADABLE, count_rows, read_columns, read_each, require_lost
from pipeline.readers_view import current_of_uris, objects, seen_of_objects
from pipeline.retry import counts, is_given_up
from pipeline.spilled_rows import SpilledRows
from pipeline.storage import Storage, StorageError

log = logging.getLogger(__name__)

_AT_ONCE = 8192  # rows taken apart in Python

# A question as it is asked: video_key, prompt_id, prompt, choices where it has some.
Ask = tuple[str, str, str] | tuple[str, str, str, Sequence[str] | None]


def ask_of(video_key: str, prompt: Mapping[str, Any]) -> Ask:
    """Return the question that a prompt (rows.PROMPT) is to a video."""
    return video_key, prompt["prompt_id"], prompt["prompt"], prompt["choices"]


def ask_key(
    video_key: str, prompt_id: str, prompt: str, choices: Sequence[str] | None = None
) -> bytes:
    """Return the 32-byte key of a question.

    The same id with another text, or with other choices, is another question.
    """
    parts: list[Any] = [video_key, prompt_id, prompt, *([list(choices)] if choices else [])]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


@dataclass(frozen=True)
class Failure:
    """Why a video is not tried again."""

    stage: str
    error_type: str
    message: str

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row that fails with it."""
        return rows.failed(row, self.stage, self.error_type, self.message)


class AnswerIndex:
    """Know what earlier runs have answered or given up, killed ones included.

    A question is answered when the row that readers see for it is an answer to the same prompt,
    with the same `fingerprint` (keys.answer_fingerprint: model, compression and answer settings in
    one). So the readers' view is right also when a setting or an object goes back to what it was.
    What is given up is up to pipeline.retry. A file that cannot be read is in `unreadable`: its
    questions are asked again.
    """

    def __init__(
        self, storage: Storage, output: str, *, fingerprint: str, max_attempts: int = 3
    ) -> None:
        """Read the columns that say so from all answers files of the output.

        `max_attempts` is `retry.max_attempts`; 0 gives nothing up.
        """
        files = find_files(output, storage)
        uris = [uri for uri in (*files.committed, *files.orphans) if is_answers(uri)]
        self.unreadable: list[str] = []
        # That count, of each video that failed in any way; of questions by their ask_key.
        self._attempts: dict[str | bytes, int] = {}
        self._given_up: dict[str, Failure] = {}
        self._asks_given_up: set[bytes] = set()
        # Rows written from now on are later than all there are, whatever this machine's clock says.
        self.not_before = datetime.fromtimestamp(0, UTC)
        of_uris = SpilledRows(_SEEN, together="uri")
        read = partial(_read_seen, storage, fingerprint=fingerprint)
        for uri, table in read_each(uris, read, files.sizes):
            if table is None:
                self.unreadable.append(uri)
            else:
                self._note(table, max_attempts)
                place = pa.array(np.arange(table.num_rows) + len(of_uris))
                of_uris.add(table.append_column("place", place))
        # A file that somebody copied in part is adopted by no run: its rows are done again.
        self.orphans = [
            uri
            for uri in files.orphans
            if uri not in self.unreadable and (is_answers(uri) or _is_readable(storage, uri))
        ]
        # What readers see is settled among all rows, those of other settings included.
        of_objects = SpilledRows(_SEEN, together="object_key")
        for table in of_uris:
            of_objects.add(current_of_uris(table))
        del of_uris  # its file may be large
        self.videos = SpilledRows(SEEN_VIDEOS)
        self._answered = key_index.KeyIndex(self._see(of_objects))

    def _note(self, table: pa.Table, max_attempts: int) -> None:
        """Note what is known from each row by itself."""
        failed = pc.and_not(table.column("own"), pc.equal(table.column("status"), "ok"))
        for row in table.filter(failed).to_pylist():
            self._remember(row, max_attempts)
        newest = pc.max(table.column("created_at")).as_py()
        if newest is not None:
            self.not_before = max(self.not_before, newest + timedelta(microseconds=1))

    def _see(self, of_objects: SpilledRows) -> Iterator[key_index.Entries]:
        """Yield what has been answered; keep in `videos` what readers see an object of."""
        for table in of_objects:
            seen = seen_of_objects(table.sort_by("place"))
            found = pc.fill_null(pc.not_equal(seen.column("error_stage"), "source"), True)
            videos = seen.filter(found)
            columns = [videos.column("uri"), videos.column("object_key")]
            self.videos.add(pa.table(columns, schema=SEEN_VIDEOS))
            done = seen.filter(pc.and_(seen.column("own"), pc.equal(seen.column("status"), "ok")))
            asks = np.frombuffer(b"".join(done.column("ask").to_pylist()), key_index.KEY)
            yield key_index.entries(asks, np.arange(len(asks)))

    def _remember(self, row: dict[str, Any], max_attempts: int) -> None:
        key, attempts = row["video_key"], row["attempts"]
        alone = row["error_stage"] == "answer"  # which fails a prompt, not the video
        self._attempts.setdefault(key, 0)
        if counts(row["error_type"]):
            failed = row["ask"] if alone else key
            self._attempts[failed] = max(self._attempts.get(failed, 0), attempts)
        if max_attempts and is_given_up(row["error_type"], attempts, max_attempts=max_attempts):
            self._asks_given_up.add(row["ask"])
            if not alone:
                self._given_up[key] = Failure(
                    row["error_stage"], row["error_type"], row["error_message"]
                )

    def __len__(self) -> int:
        """Return the number of questions that have been answered."""
        return len(self._answered)

    def answered(self, asks: Sequence[Ask]) -> npt.NDArray[np.bool_]:
        """Say for each question whether it has been answered."""
        digests = b"".join(ask_key(*ask) for ask in asks)
        found = self._answered.find(np.frombuffer(digests, key_index.KEY))
        return found >= 0

    def given_up(self, video_key: str) -> Failure | None:
        """Return why a video is not tried again; None: it is."""
        return self._given_up.get(video_key)

    def ask_given_up(
        self, video_key: str, prompt_id: str, prompt: str, choices: Sequence[str] | None = None
    ) -> bool:
        """Say whether a question already has the failure that it would get again."""
        return ask_key(video_key, prompt_id, prompt, choices) in self._asks_given_up

    def attempts(self, video_key: str, prompts: Sequence[Mapping[str, Any]] = ()) -> int:
        """Return how often a video, or one of these prompts of it, has failed in a way that counts.

        Which ways do is up to pipeline.retry.
        """
        failed: list[str | bytes] = [video_key]
        failed += [ask_key(*ask_of(video_key, prompt)) for prompt in prompts]
        return max(self._attempts.get(each, 0) for each in failed)

    def has_failed(self, video_key: str) -> bool:
        """Say whether a video, or a question about it, has ever failed."""
        return video_key in self._attempts


# Which object readers see of a uri; the key is that of the video, also where it is cut in windows.
SEEN_VIDEOS = pa.schema([("uri", pa.string()), ("video_key", pa.string())])

# The columns that settle what readers see; a million rows of them take 0.4 GB.
_READ = pa.schema(
    [
        *(
            rows.ANSWERS.field(name)
            for name in (
                "video_key",
                "object_key",
                "window_s",
                "start_s",
                "uri",
                "prompt_id",
                "status",
                "error_stage",
                "error_type",
                "error_message",
                "attempts",
                "created_at",
            )
        ),
        ("own", pa.bool_()),  # of the fingerprint in question
        ("ask", pa.binary(32)),
    ]
)
_SEEN = _READ.append(pa.field("place", pa.int64()))  # among all rows: it decides between equals


def _is_readable(storage: Storage, uri: str) -> bool:
    try:
        count_rows(storage, uri)
    except (*UNREADABLE, StorageError) as error:
        require_lost(error)
        log.warning("videos file %s cannot be read, it is left out: %s", uri, error)
        return False
    return True


def _read_seen(storage: Storage, uri: str, *, fingerprint: str) -> pa.Table | None:
    stored = [name for name in _READ.names if name in rows.ANSWERS.names]
    columns = [*stored, "prompt", "choices", "fingerprint"]
    try:
        table = rows.completed(read_columns(storage, uri, columns), columns, rows.ANSWERS)
    except (*UNREADABLE, StorageError) as error:
        require_lost(error)
        log.warning("answers file %s cannot be read, it is left out: %s", uri, error)
        return None
    asked = table.select(["video_key", "prompt_id", "prompt", "choices"])
    asks = [
        ask_key(*ask)
        for batch in asked.to_batches(max_chunksize=_AT_ONCE)
        for ask in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    ]
    own = pc.equal(table.column("fingerprint"), fingerprint)
    of_object = table.column_names.index("object_key")
    table = table.set_column(of_object, "object_key", objects(table))
    return pa.table(
        [*table.select(stored).columns, own, pa.array(asks, pa.binary(32))], schema=_READ
    )
