"""The sink: rows become files that readers see once the run is committed."""

import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import rows
from pipeline.storage import Storage, join

COUNTS = pa.schema(
    [
        ("num_videos", pa.int64()),
        ("num_failed_videos", pa.int64()),
        ("num_answers", pa.int64()),
        ("num_failed_answers", pa.int64()),
    ]
)

_EPOCH = datetime.fromtimestamp(0, UTC)


class Sink:
    """Write a block as one answers file and one videos file, each atomically.

    Reads: the columns of rows.ANSWERED, or of rows.KEPT when nothing was asked. Writes: one row of
    rows.ANSWERS a prompt, one of rows.VIDEOS a video. A block that is written twice (a repeated
    task) is harmless: readers and the report count a video once.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        run_id: str,
        model: str,
        fingerprint: str,
        answered: bool = True,
        not_before: datetime = _EPOCH,
    ) -> None:
        """Take the run's folder; `fingerprint` is keys.answer_fingerprint.

        No row is dated before `not_before`: the latest row counts, so the rows of a run are later
        than all that lay there when it began, whatever the clocks of its machines say.

        With `answered=False` the videos were only compressed: a good one has no answers, a failed
        one still fails its prompts, so that later runs know.
        """
        self._answered = answered
        self._not_before = not_before
        self._storage = storage
        self._folder = folder
        self._run_id = run_id
        self._model = model
        self._fingerprint = fingerprint

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return one row of COUNTS."""
        videos, answers = [], []
        now = max(datetime.now(UTC), self._not_before)
        for row in rows.iterate(block):
            of_video = [
                {
                    **answer,
                    "model": self._model,
                    "fingerprint": self._fingerprint,
                    "run_id": self._run_id,
                    "created_at": now,
                }
                for answer in (_unfold(row) if self._answered or row["error_type"] else ())
            ]
            failed = sum(answer["status"] == "failed" for answer in of_video)
            answers.extend(of_video)
            videos.append(
                {
                    **row,
                    **rows.part_of(row),
                    "num_prompts": len(of_video),
                    "num_failed_prompts": failed,
                    "run_id": self._run_id,
                }
            )
        if videos:
            # Answers first: a video that is counted has its answers.
            if answers:
                self._write("answers", rows.build(answers, rows.ANSWERS))
            self._write("videos", rows.build(videos, rows.VIDEOS))
        counts = {
            "num_videos": len(videos),
            "num_failed_videos": sum(video["error_type"] is not None for video in videos),
            "num_answers": len(answers),
            "num_failed_answers": sum(video["num_failed_prompts"] for video in videos),
        }
        return rows.build([counts], COUNTS)

    def _write(self, kind: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        uri = join(self._folder, f"{kind}-{uuid.uuid4().hex}.parquet")
        self._storage.write(uri, sink.getvalue())


def _unfold(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row of rows.ANSWERS for each prompt of a video, without the run's own columns."""
    assert row["prompts"], f"{row['uri']} is asked nothing"
    shared = {name: row[name] for name in ("video_key", "uri", "attempts")} | rows.part_of(row)
    if row["error_type"] is not None:
        failure = {name: row[name] for name in ("error_stage", "error_type", "error_message")}
        for prompt in row["prompts"]:
            yield {**shared, **prompt, **failure, "status": "failed"}
        return
    asked = [prompt["prompt_id"] for prompt in row["prompts"]]
    given = [answer["prompt_id"] for answer in row["answers"] or []]
    assert asked == given, f"{row['uri']} was asked {asked}, answered {given}"
    for prompt, answer in zip(row["prompts"], row["answers"], strict=True):
        failed = answer["error_type"] is not None
        yield {
            **shared,
            **prompt,
            **answer,
            "status": "failed" if failed else "ok",
            "error_stage": "answer" if failed else None,
        }
