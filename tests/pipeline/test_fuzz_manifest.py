"""Manifests of any bytes: each line is asked or named as broken, or the whole is refused."""

import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.data.extensions import ArrowPythonObjectArray, ArrowPythonObjectType

from pipeline import manifest as manifest_module
from pipeline.boundary import BoundaryError, roots_of
from pipeline.config import CaptionConfig, StorageConfig
from pipeline.errors import StartupError
from pipeline.manifest import Manifest, read_manifest
from pipeline.parquet import read_columns
from pipeline.redaction import holds_secret
from pipeline.storage import S3, Storage

STORAGE = Storage(StorageConfig())
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = st.sampled_from(
    ["a.mp4", "../a.mp4", "/etc/passwd", "s3://b/a.mp4", "s3://u:p@b/a", "http://x/a", "file:///a",
     "", " ", "\0", "\ud800", "a\nb.mp4", "s3://b/a?X-Amz-Signature=0", "f" * 64, "ünï.mp4"]
)  # fmt: skip
VALUES = st.one_of(WORDS, st.text(max_size=20), st.none(), st.integers(), st.lists(st.none()))
RECORDS = st.dictionaries(
    st.sampled_from(["uri", "video_key", "prompt", "prompt_id", "other"]), VALUES
)


def read(path: Path, content: bytes) -> Manifest | None:
    """Read a manifest; None where it is refused as a whole."""
    path.write_bytes(content)
    try:
        found = read_manifest(STORAGE, str(path))
    except StartupError:
        return None
    roots = roots_of(CaptionConfig(source=str(path), output="out"))
    for ask in found.asks.to_pylist():
        uri = ask["uri"]
        assert uri or len(ask["video_key"]) == 64
        assert not holds_secret(uri or "")
        try:
            roots.check(uri or "s3://bucket/key")
        except BoundaryError:
            continue
        # "." is the folder itself: inside, and a failed row, since no folder is a video
        assert uri is None or f"{uri}/".startswith((S3, f"{path.parent}/"))
    return found


@SETTINGS
@given(records=st.lists(RECORDS, max_size=8))
def test_every_json_line_is_an_ask_or_a_broken_line(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    text = "\n".join(map(json.dumps, records))
    found = read(tmp_path / "m.jsonl", text.encode())
    assert found is not None
    assert found.asks.num_rows + len(found.broken) == len(records)


@SETTINGS
@given(content=st.binary(max_size=200))
def test_any_bytes_as_json_lines(tmp_path: Path, content: bytes) -> None:
    found = read(tmp_path / "m.jsonl", content)
    assert found is not None
    lines = [line for line in content.split(b"\n") if line.strip()]
    assert found.asks.num_rows + len(found.broken) == len(lines)


@SETTINGS
@given(rows=st.lists(st.lists(WORDS.filter(lambda w: "\ud800" not in w), min_size=1, max_size=4)))
def test_every_csv_row_is_an_ask_or_a_broken_line(tmp_path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["uri", "prompt"], *rows])
    found = read(tmp_path / "m.csv", text.getvalue().encode())
    assert found is not None
    assert found.asks.num_rows + len(found.broken) == len(rows)


@SETTINGS
@given(content=st.binary(max_size=200), header=st.sampled_from([b"", b"uri\n", b"prompt,uri\r\n"]))
def test_any_bytes_as_csv(tmp_path: Path, content: bytes, header: bytes) -> None:
    read(tmp_path / "m.csv", header + content)


@settings(SETTINGS, max_examples=400)
@given(seed=st.integers(0, 2**32), compression=st.sampled_from(["none", "snappy", "zstd"]))
def test_broken_parquet(tmp_path: Path, seed: int, compression: str) -> None:
    random = np.random.default_rng(seed)
    sink = pa.BufferOutputStream()
    uris = [f"{number}.mp4" for number in range(200)]
    pq.write_table(pa.table({"uri": uris, "prompt": ["why?"] * 200}), sink, compression=compression)
    content = bytearray(sink.getvalue().to_pybytes())
    for _ in range(int(2 ** random.uniform(0, 6))):  # half of them where the schema is
        start = 0 if random.random() < 0.5 else len(content) - 700
        content[int(random.integers(start, len(content)))] = int(random.integers(256))
    read(tmp_path / "m.parquet", bytes(content))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_line_without_an_end_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(manifest_module, "_MAX_LINE", 400_000)
    long = "x" * 900_001
    lines = {
        "jsonl": ['{"uri": "a.mp4"}', f'{{"uri": "{long}"}}', '{"uri": "b.mp4"}'],
        "csv": ["uri", "a.mp4", long, "b.mp4"],
    }[ending]
    found = read(tmp_path / f"m.{ending}", "\n".join(lines).encode())
    assert found is not None
    assert [Path(uri).name for uri in found.asks.column("uri").to_pylist()] == ["a.mp4", "b.mp4"]
    assert len(found.broken) == 1


def test_a_text_that_no_model_reads_is_a_broken_line(tmp_path: Path) -> None:
    record = {"uri": "a.mp4", "prompt": "y" * 131_073}
    found = read(tmp_path / "m.jsonl", json.dumps(record).encode())
    assert found is not None
    assert "131073 characters, more than 131072" in found.broken[0].message


def test_bytes_that_are_no_text_cost_their_row(tmp_path: Path) -> None:
    uris = [b"a.mp4", b"\xff.mp4", b"b.mp4", b"c.mp4\xdc"]
    binary = pa.array(uris, pa.binary())
    text = pa.StringArray.from_buffers(len(uris), *binary.buffers()[1:])  # not checked by Arrow
    pq.write_table(pa.table({"uri": text}), tmp_path / "m.parquet")
    found = read(tmp_path / "m.parquet", (tmp_path / "m.parquet").read_bytes())
    assert found is not None
    assert [Path(uri).name for uri in found.asks.column("uri").to_pylist()] == ["a.mp4", "b.mp4"]
    assert [line.uri.rpartition("#")[2] for line in found.broken] == ["row 2", "row 4"]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._path,)


def test_pickles_in_parquet_are_never_loaded(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    storage = pa.array([pickle.dumps(Trap(sprung))], pa.large_binary())
    column = ArrowPythonObjectArray.from_storage(ArrowPythonObjectType(), storage)
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"uri": column, "tokens": column}), path)
    with pytest.raises(StartupError, match=r"column uri is .*not a string"):
        read_manifest(STORAGE, str(path))
    with pytest.raises(ValueError, match=r"column uri is .*not a plain type"):
        read_columns(STORAGE, str(path))  # as a cache or as answers
    assert not sprung.exists()
    pq.read_table(path).to_pylist()
    assert sprung.exists()  # who does read it falls in
