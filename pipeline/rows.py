"""The column contract: which columns a row has at each point of the flow, and who writes them.

One row is one video from `source` to `answer`, or one window of it where `media.window_s` cuts it;
the sink unfolds it to one row a prompt.
All types are plain Arrow, so that DuckDB, Polars and pandas read every file the pipeline writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

_LARGE_BYTES = 1 << 20

# `choices`: the answer is the likeliest of these; null: it is free text.
PROMPT = pa.struct(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("choices", pa.list_(pa.string()))]
)

# source: which video, which questions. A row with an `error_type` has failed and is passed on
# untouched by every later stage, so that rows out = rows in.
IDENTITY = pa.schema(
    [
        ("video_key", pa.string()),  # of the video, or of one window of it
        ("object_key", pa.string()),  # of the video
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),  # "" for local files
        ("prompts", pa.list_(PROMPT)),
        ("attempts", pa.int32()),  # those that count (pipeline.retry), and this run's
        ("window_s", pa.float64()),  # media.window_s of the run; null: videos are not cut
        ("start_s", pa.float64()),  # where the window begins in the video; null: it is whole
        ("windows", pa.int32()),  # rows that decode made of the video in this run; null: this one
        ("skip_windows", pa.list_(pa.int32())),  # for decode: windows that are there already
        ("error_stage", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
    ]
)

# Seconds each stage spent on the row, null where it passed it on: the report is a recount of them.
_MEASURES = [
    ("decode_s", pa.float64()),
    ("compress_s", pa.float64()),
    ("cache_s", pa.float64()),
    ("answer_s", pa.float64()),
    ("cache_hit", pa.bool_()),
    ("nvdec", pa.bool_()),  # whether NVDEC decoded it; null: decode.nvdec is false
]

_VIDEO = [
    ("duration_s", pa.float64()),  # of the video, or of the window
    ("fps", pa.float64()),  # sampled frames a second, true, also below media.fps
    ("has_audio", pa.bool_()),
]

# decode: what the towers read. Null in a failed row.
DECODED = pa.schema(
    [
        *IDENTITY,
        *_VIDEO,
        ("frames", pa.large_binary()),  # uint8, C order
        ("frames_shape", pa.list_(pa.int32())),  # [T, H, W, 3], T even, H and W multiples of 28
        ("audio", pa.large_binary()),  # float32 mono at 16 kHz; empty when has_audio is false
        *_MEASURES,
    ]
)

_TOKENS = [
    ("tokens", pa.large_binary()),  # little endian, see token_dtype
    ("token_dtype", pa.string()),  # float32, bfloat16, int8: omnisift.codec has the bytes
    ("token_shape", pa.list_(pa.int32())),  # [n, D]
    ("positions", pa.list_(pa.list_(pa.int32()))),  # [3, n], relative to the block's start
    ("modality", pa.list_(pa.uint8())),  # [n], omnisift.layout.Modality
    ("next_position", pa.int32()),  # where the text behind the block continues, relative
    ("kept_index", pa.list_(pa.int32())),  # [n], index in the uncompressed block
    ("num_video_tokens", pa.int32()),
    ("num_audio_tokens", pa.int32()),
    ("kept_video_tokens", pa.int32()),
    ("kept_audio_tokens", pa.int32()),
]

# compress: the kept tokens. Null in a failed row.
KEPT = pa.schema([*IDENTITY, *_VIDEO, *_TOKENS, *_MEASURES])

# cache: what lies in <cache>/<fingerprint>/part-*.parquet.
CACHED = pa.schema(
    [
        ("video_key", pa.string()),
        ("uri", pa.string()),
        *_VIDEO,
        *_TOKENS,
        ("sha256", pa.string()),  # over tokens, positions, modality, next_position, kept_index
        ("run_id", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)

ANSWER = pa.struct(
    [
        ("prompt_id", pa.string()),
        ("text", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("error_type", pa.string()),  # of this prompt alone; null when answered
        ("error_message", pa.string()),
    ]
)

# answer: one answer a prompt, in the order of `prompts`; the tokens end here.
_COUNTS = [column for column in _TOKENS if column[0].endswith("_tokens")]
ANSWERED = pa.schema([*IDENTITY, *_VIDEO, *_COUNTS, ("answers", pa.list_(ANSWER)), *_MEASURES])

# Which part of which object a row of the sink is about; null in files of before there were windows.
_PART = [
    ("object_key", pa.string()),  # of the video; video_key is its window's where it is cut
    ("window_s", pa.float64()),  # media.window_s of the run; null: videos are not cut
    ("start_s", pa.float64()),  # of the window, in seconds of the video; null: it is whole
    ("end_s", pa.float64()),
]

# sink: what readers see, one row for each (video_key, prompt_id).
ANSWERS = pa.schema(
    [
        ("video_key", pa.string()),
        ("uri", pa.string()),
        *_PART,
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("text", pa.string()),
        ("status", pa.string()),  # ok, failed; deleted: of the uri alone, hides what was before
        ("error_stage", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),  # as above
        ("num_prompt_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("model", pa.string()),
        ("fingerprint", pa.string()),
        ("run_id", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)

# sink: one row a video beside the answers; the report recounts these.
VIDEOS = pa.schema(
    [
        ("video_key", pa.string()),
        ("uri", pa.string()),
        *_PART,
        ("windows", pa.int32()),  # see IDENTITY
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("error_stage", pa.string()),
        ("error_type", pa.string()),
        *_VIDEO,
        *_COUNTS,
        *_MEASURES,
        ("num_prompts", pa.int32()),
        ("num_failed_prompts", pa.int32()),
        ("run_id", pa.string()),
    ]
)


def iterate(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a block as dicts; large binaries are views of the block, not copies."""
    for batch in table.to_batches():
        columns = [
            _views(column) if pa.types.is_large_binary(column.type) else column.to_pylist()
            for column in batch.columns
        ]
        for values in zip(*columns, strict=True):
            yield dict(zip(batch.schema.names, values, strict=True))


def _views(column: pa.LargeBinaryArray) -> Iterator[memoryview | None]:
    _, offsets, data = column.buffers()
    for index in range(len(column)):
        if not column[index].is_valid:
            yield None
            continue
        start, end = np.frombuffer(offsets, np.int64)[column.offset + index :][:2]
        yield memoryview(data)[start:end] if data else memoryview(b"")


def build(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Make a block of `schema` from rows; columns a row lacks are null, others are left out.

    Large binaries are not copied: the block holds on to the memory they lie in.
    """
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        large = pa.types.is_large_binary(field.type)
        columns.append(_binaries(values) if large else pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def _binaries(values: Sequence[bytes | memoryview | None]) -> pa.ChunkedArray:
    chunks = []
    for large, run in groupby(values, lambda value: len(value or b"") >= _LARGE_BYTES):
        if large:  # a chunk for each: to put them side by side would copy them
            chunks += [_borrow(value) for value in run if value is not None]
        else:
            chunks.append(pa.array(list(run), pa.large_binary()))
    return pa.chunked_array(chunks, pa.large_binary())


def _borrow(value: bytes | memoryview) -> pa.LargeBinaryArray:
    ends = pa.py_buffer(np.array([0, len(value)], np.int64))
    buffers = [None, ends, pa.py_buffer(value)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)


# Columns that files of earlier versions lack.
_LATER = {"choices", "windows", "nvdec", *(name for name, _ in _PART)}


def completed(table: pa.Table, names: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Return columns of a table of rows.ANSWERS or rows.VIDEOS; null where it is older than they.

    Raises ValueError when it lacks others.
    """
    missing = [name for name in names if name not in table.column_names]
    if not _LATER.issuperset(missing):
        raise ValueError(f"its columns are {', '.join(table.column_names)}")
    for name in missing:
        field = schema.field(name)
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(list(names))


def part_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the sink that say which part of which video a row is about."""
    start, length = row["start_s"], row["duration_s"]
    end = None if start is None or length is None else start + length
    return {**{name: row[name] for name in ("object_key", "window_s", "start_s")}, "end_s": end}


def failed(row: Mapping[str, Any], stage: str, error_type: str, message: str) -> dict[str, Any]:
    """Return `row` as a failed one. `error_type` is a stable word, `message` names the video."""
    return {**row, "error_stage": stage, "error_type": error_type, "error_message": message}
