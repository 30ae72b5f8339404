"""Read a manifest: which videos, which prompts. Parquet, CSV or JSONL with `uri` or `video_key`.

A manifest is held as Arrow columns, never as a Python object a row, since it may name 10^8 videos.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StartupError
from pipeline.keys import plain
from pipeline.redaction import holds_secret
from pipeline.storage import S3, Storage, StorageError, join

SUFFIXES = (".parquet", ".csv", ".jsonl")

# Large strings: the offsets of plain ones end at 2 GB, which sorting 10^7 uris would pass.
ASKS = pa.schema(
    [
        ("uri", pa.large_string()),  # null: video_key names the video
        ("video_key", pa.large_string()),  # null where there is a uri
        ("prompt_id", pa.large_string()),  # null: the manifest names none
        ("prompt", pa.large_string()),  # null: the configured prompt
        ("choices", pa.large_string()),  # a JSON list; null: the answer is free text
        ("line", pa.int64()),
    ]
)

_COLUMNS = ("uri", "video_key", "prompt_id", "prompt")
_NAMES = frozenset({"uri", "video_key"})  # a manifest has at least one of them
_BATCH = 65_536  # lines
_MAX_CHARACTERS = csv.field_size_limit()  # 131,072, of a uri or a prompt in any format
_MAX_LINE = 1 << 20  # bytes of JSONL, characters of CSV: a line is held as a whole
_PARQUET_BATCH = 1024  # rows; a small file may repeat one long text any number of times
_KEY = re.compile(r"^[0-9a-f]{64}$")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class BrokenLine:
    """A line that asks for nothing that can be done."""

    uri: str  # "<manifest>#line N", since the line itself may name no video
    message: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest asks for, sorted by uri, then line; and its broken lines."""

    asks: pa.Table
    broken: list[BrokenLine]


def is_manifest(source: str) -> bool:
    """Say whether `source` names a manifest and not a prefix."""
    return source.lower().endswith(SUFFIXES)


def folder_of(manifest: str) -> str:
    """Return the folder that relative uris of a manifest, and its keys, start from."""
    return manifest.rpartition("/")[0] or "."


def broken_line(manifest: str, line: int, message: str) -> BrokenLine:
    """Name a line by number, from 1 (in Parquet: row N, from 1)."""
    place = "row" if manifest.lower().endswith(".parquet") else "line"
    uri = f"{manifest}#{place} {line}"
    return BrokenLine(uri, f"{uri}: {message}")


def read_manifest(storage: Storage, manifest: str) -> Manifest:
    """Read the whole manifest; uris in it that are relative get its folder in front.

    Raises StartupError when it cannot be read at all or has neither `uri` nor `video_key`.
    """
    read = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}[manifest.rpartition(".")[2].lower()]
    folder = folder_of(manifest)
    batches, broken = [ASKS.empty_table()], []
    try:
        with storage.open(manifest) as file:
            lines = read(file)
            while batch := list(islice(lines, _BATCH)):
                asks = []
                for line, record in batch:
                    ask = _ask(record, folder)
                    if isinstance(ask, str):
                        broken.append(broken_line(manifest, line, ask))
                    else:
                        asks.append({**ask, "line": line})
                batches.append(pa.Table.from_pylist(asks, ASKS))
    except StorageError as error:
        raise StartupError(f"source={manifest}: the manifest cannot be read: {error}") from error
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError, _UnusableError) as error:
        raise StartupError(
            f"source={manifest}: the manifest cannot be read: {error}; it must be a .parquet, "
            ".csv or .jsonl file with a column uri or video_key, and may have prompt and prompt_id"
        ) from error
    asks_table = pa.concat_tables(batches).sort_by([("uri", "ascending"), ("line", "ascending")])
    return Manifest(asks_table, broken)


class _UnusableError(Exception):
    """The manifest as a whole is not what it must be."""


# A line is its number and either its columns or what is wrong with it.
_Line = tuple[int, Mapping[str, Any] | str]


def _parquet(file: Any) -> Iterator[_Line]:
    part = pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=False)
    schema = part.schema_arrow
    names = [name for name in (*_COLUMNS, "choices") if name in schema.names]
    if not _NAMES & set(names):
        found = ", ".join(schema.names)
        raise _UnusableError(f"it has no column uri or video_key, only {found}")
    for name in names:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name == "choices" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            kind = kind.value_type
        if not any(
            test(kind)
            for test in (
                pa.types.is_string,
                pa.types.is_large_string,
                pa.types.is_string_view,
                pa.types.is_null,
            )
        ):
            raise _UnusableError(f"its column {name} is {kind}, not a string")
    line = 0
    for batch in part.iter_batches(batch_size=_PARQUET_BATCH, columns=names):
        for record in _records(batch):
            line += 1
            yield line, record


def _records(batch: pa.RecordBatch) -> list[Mapping[str, Any] | str]:
    """Return the rows; Parquet's strings may hold bytes that are no text, which fail their row."""
    try:
        records: list[Mapping[str, Any] | str] = batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return ["it is not UTF-8"]
        middle = len(batch) // 2
        return _records(batch.slice(0, middle)) + _records(batch.slice(middle))
    return records


def _csv(file: Any) -> Iterator[_Line]:
    # Bytes that are not UTF-8 become lone surrogates, and so fail their own line alone.
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(
            _lines(text), strict=True
        )  # else an open quote swallows the rest unsaid
        header = next(reader, [])
        if not _NAMES & set(header):
            found = ",".join(header)[:200]
            raise _UnusableError(f"its first line has no column uri or video_key: {found!r}")
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield reader.line_num, f"it is not CSV: {error}"
                continue
            if values is None:
                return
            if not values:
                continue  # an empty line
            if len(values) == len(header):
                yield reader.line_num, dict(zip(header, values, strict=True))
            else:
                yield reader.line_num, f"it has {len(values)} columns, the header {len(header)}"


def _jsonl(file: Any) -> Iterator[_Line]:
    for number, line in enumerate(_lines(file), start=1):
        if len(line) > _MAX_LINE:
            yield number, f"it is longer than {_MAX_LINE} bytes"
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"it is not JSON: {error}"
            continue
        yield number, record if isinstance(record, dict) else "it is not a JSON object"


def _lines(file: Any) -> Iterator[Any]:
    """Yield the lines of a file of text or bytes; of a longer one than _MAX_LINE, its beginning."""
    while line := file.readline(_MAX_LINE + 1):
        rest = line
        while len(rest) > _MAX_LINE and rest[-1:] not in ("\n", "\r", b"\n"):
            rest = file.readline(_MAX_LINE + 1)
        yield line


def _ask(record: Mapping[str, Any] | str, folder: str) -> dict[str, str | None] | str:
    """Return the columns of a line, or what is wrong with it."""
    if isinstance(record, str):
        return record
    ask = _columns_of(record)
    if isinstance(ask, str):
        return ask
    uri = ask["uri"]
    if uri is None:
        key = ask["video_key"]
        if key is None:
            return "it has no uri and no video_key"
        return ask if _KEY.match(key) else "video_key is not 64 hex digits"
    ask["video_key"] = None  # the uri says which object is meant, as it is now
    if holds_secret(uri):
        return "its uri holds credentials or is presigned; give them in the environment"
    scheme = _SCHEME.match(uri)
    if scheme and not uri.startswith((S3, "file://")):
        return f"its uri starts with {scheme[0]}; s3:// and local paths are read"
    ask["uri"] = plain(uri) if scheme else _relative(uri, folder)
    return ask


def _columns_of(record: Mapping[str, Any]) -> dict[str, str | None] | str:
    ask: dict[str, str | None] = {}
    for name in _COLUMNS:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name} is {type(value).__name__}, not a string"
        if value is not None and not _is_text(value):
            return f"{name} is not UTF-8"
        if value is not None and len(value) > _MAX_CHARACTERS:
            return f"{name} has {len(value)} characters, more than {_MAX_CHARACTERS}"
        ask[name] = value if value and value.strip() else None
    choices = _choices(record.get("choices"))
    if isinstance(choices, str):
        return choices
    ask["choices"] = json.dumps(choices) if choices else None
    return ask


def _choices(value: Any) -> list[str] | str | None:
    """Return the options of a line, None where there are none, or what is wrong with them.

    They are a list of strings, or a string: a JSON list, or options between bars, `yes|no`.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return f"choices is not a JSON list: {error}"
    elif isinstance(value, str):
        value = value.split("|")
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        return f"choices is {value!r:.60}, not a list of strings"
    options = [option.strip() for option in value]
    if not all(options) or not all(map(_is_text, options)):
        return f"choices has an option that is empty or not UTF-8: {options!r:.80}"
    if len(options) < 2 or len(set(options)) < len(options):
        return f"choices must be at least two different options, got {options!r:.80}"
    return options


def _relative(path: str, folder: str) -> str:
    if path.startswith("/"):
        return plain(path)
    if folder.startswith(S3):
        return join(folder, path)
    # One spelling for one file, so that a/../b.mp4 and b.mp4 are one video.
    return plain(f"{folder}/{path}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
