"""Add up what a run wrote, table by table: it may be more than the memory holds."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import rows
from pipeline.parquet import read_columns, read_each
from pipeline.readers_view import DELETED
from pipeline.spilled_rows import SpilledRows
from pipeline.storage import Storage

STAGES = ("decode", "compress", "cache", "answer")

_MAX_EXAMPLES = 100_000  # failures that are kept, for a report to pick from
_SUMMED = (
    "num_video_tokens",
    "num_audio_tokens",
    "kept_video_tokens",
    "kept_audio_tokens",
    "cache_hit",
    "nvdec",
    "duration_s",
)
_ANSWERS = pa.schema(
    rows.ANSWERS.field(name)
    for name in ("video_key", "uri", "prompt_id", "status", "error_type", "error_message")
)


@dataclass
class Videos:
    """What the videos files of a run add up to; filled table by table."""

    rows: int = 0
    windows: int = 0
    ok: int = 0
    cut_rows: int = 0  # beyond the work list: decode cut videos into windows
    cut_prompts: int = 0
    failed_by_type: Counter[str] = field(default_factory=Counter)
    failed_keys: set[str] = field(default_factory=set)
    # Of columns, over the good ones; of "<stage> <column>", over those that the stage worked on.
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass
class Answers:
    """What the answers files of a run add up to."""

    rows: int = 0
    failed: int = 0
    failed_by_type: Counter[str] = field(default_factory=Counter)  # of videos that did not fail
    examples: list[dict[str, Any]] = field(default_factory=list)  # failures, not too many


def count_videos(storage: Storage, files: Sequence[str]) -> Videos:
    """Add up the videos files among the files of a run."""
    found = Videos()
    for videos in _distinct(storage, files, "videos-", rows.VIDEOS, "object_key", ["video_key"]):
        good = videos.filter(pc.is_null(videos.column("error_type")))
        failed = videos.filter(pc.is_valid(videos.column("error_type")))
        cut = _in_windows(videos)
        found.rows += videos.num_rows
        found.windows += videos.num_rows - videos.column("start_s").null_count
        found.ok += good.num_rows
        found.cut_rows += cut.rows
        found.cut_prompts += cut.prompts
        found.failed_by_type.update(failed.column("error_type").to_pylist())
        found.failed_keys.update(failed.column("video_key").to_pylist())
        for column in _SUMMED:
            found.sums[column] += pc.sum(good.column(column)).as_py() or 0
        found.sums["nvdec or not"] += pc.count(good.column("nvdec")).as_py()
        for stage in STAGES:
            own = videos.filter(pc.is_valid(videos.column(f"{stage}_s")))
            found.sums[f"{stage} videos"] += own.num_rows
            for column in (f"{stage}_s", "duration_s"):
                found.sums[f"{stage} {column}"] += pc.sum(own.column(column)).as_py() or 0
    return found


def count_answers(storage: Storage, files: Sequence[str], failed_keys: set[str]) -> Answers:
    """Add up the answers files among them; `failed_keys` are those of videos that failed."""
    found = Answers()
    identity = ["video_key", "prompt_id"]
    for table in _distinct(storage, files, "answers-", _ANSWERS, "video_key", identity):
        answers = table.filter(pc.not_equal(table.column("status"), DELETED))
        bad = answers.filter(pc.equal(answers.column("status"), "failed"))
        found.rows += answers.num_rows
        found.failed += bad.num_rows
        types = zip(
            *(bad.column(name).to_pylist() for name in ("video_key", "error_type")), strict=True
        )
        found.failed_by_type.update(kind for key, kind in types if key not in failed_keys)
        left = _MAX_EXAMPLES - len(found.examples)
        found.examples += bad.slice(0, left).to_pylist()
    return found


def _distinct(
    storage: Storage,
    files: Sequence[str],
    kind: str,
    schema: pa.Schema,
    together: str,
    identity: list[str],
) -> Iterator[pa.Table]:
    """Yield the rows of a kind of file, one for each identity: a repeated task wrote it again.

    Those with the same text in the column `together` come in one table.
    """
    own = [uri for uri in files if uri.rpartition("/")[2].startswith(kind)]
    stored = SpilledRows(schema, together=together)
    for _, table in read_each(own, lambda uri: read_columns(storage, uri, schema.names)):
        stored.add(table.cast(schema))
    for table in stored:
        place = pa.array(np.arange(table.num_rows))
        placed = table.select(identity).append_column("place", place)
        last = placed.group_by(identity).aggregate([("place", "max")]).column("place_max")
        yield table.take(pa.array(np.sort(np.asarray(last))))


@dataclass(frozen=True)
class _Cut:
    """What decode added to the work list by cutting videos into windows."""

    rows: int
    prompts: int


def _in_windows(videos: pa.Table) -> _Cut:
    """Count the rows, and their prompts, beyond the one that each cut video was.

    A video whose worker died for good, after some of its windows had gone on, has a row of its own.
    """
    table = videos.select(["object_key", "windows", "num_prompts"])
    cut = table.filter(pc.is_valid(table.column("windows"))).to_pylist()
    whole = videos.filter(pc.is_null(videos.column("windows")))
    failed = set(whole.filter(pc.is_null(whole.column("start_s"))).column("object_key").to_pylist())
    rows_, prompts = 0, 0
    of_object: dict[str, list[dict[str, Any]]] = {}
    for row in cut:
        of_object.setdefault(row["object_key"], []).append(row)
    for key, own in of_object.items():
        prompts += sum(row["num_prompts"] for row in own)
        if key in failed:
            rows_ += len(own)
        else:
            rows_ += own[0]["windows"] - 1
            prompts -= own[0]["num_prompts"]
    return _Cut(rows_, prompts)
