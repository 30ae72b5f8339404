from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import rows

SCHEMAS = {
    name: getattr(rows, name)
    for name in ("IDENTITY", "DECODED", "KEPT", "CACHED", "ANSWERED", "ANSWERS", "VIDEOS")
}

identity = st.fixed_dictionaries(
    {
        "video_key": st.text(),
        "object_key": st.text(),
        "uri": st.text(),
        "size_bytes": st.integers(0, 1 << 62),
        "etag": st.text(),
        "prompts": st.lists(
            st.fixed_dictionaries(
                {
                    "prompt_id": st.text(),
                    "prompt": st.text(),
                    "choices": st.none() | st.lists(st.text()),
                }
            ),
            max_size=3,
        ),
        "attempts": st.integers(1, 9),
        "window_s": st.none() | st.floats(2, 298),
        "start_s": st.none() | st.floats(0, 1e5),
        "windows": st.none() | st.integers(1, 9),
        "skip_windows": st.none() | st.lists(st.integers(0, 1000)),
        "error_stage": st.none() | st.text(),
        "error_type": st.none() | st.text(),
        "error_message": st.none() | st.text(),
    }
)


@settings(deadline=None)
@given(st.lists(identity, max_size=4))
def test_rows_come_back_as_they_were(videos: list[dict[str, Any]]) -> None:
    block = rows.build(videos, rows.IDENTITY)
    assert block.schema == rows.IDENTITY
    assert list(rows.iterate(block)) == videos


def test_large_binaries_are_views_of_the_block() -> None:
    frames = np.arange(24, dtype=np.uint8)
    block = rows.build(
        [{"frames": b"before"}, {"frames": frames.tobytes()}, {}, {"frames": b""}], rows.DECODED
    )
    data = block.column("frames").chunk(0).buffers()[2]
    for table, expected in ((block, 4), (block.slice(1), 3)):
        found = [row["frames"] for row in rows.iterate(table)][-3:]
        assert len(list(rows.iterate(table))) == expected
        view = np.frombuffer(found[0], np.uint8)
        assert np.array_equal(view, frames)
        assert view.ctypes.data == data.address + len(b"before")
        assert found[1] is None
        assert bytes(found[2]) == b""


def test_megabytes_are_borrowed_and_come_back_in_order() -> None:
    megabytes = [np.full(rows._LARGE_BYTES + size, size, np.uint8) for size in (0, 1, 5)]
    small = np.arange(24, dtype=np.uint8)
    given = [megabytes[0].data, None, small.data, megabytes[1].data, b"", megabytes[2].data]
    videos = [{"uri": str(n), "frames": value} for n, value in enumerate(given)]
    block = rows.build(videos, rows.DECODED)
    assert block.schema == rows.DECODED
    block.validate(full=True)
    found = [(row["uri"], row["frames"]) for row in rows.iterate(block)]
    assert [uri for uri, _ in found] == [video["uri"] for video in videos]
    for value, (_, back) in zip(given, found, strict=True):
        assert (value is None) == (back is None)
        assert bytes(value or b"") == bytes(back or b"")
    for array, place in zip(megabytes, (0, 3, 5), strict=True):
        view = np.frombuffer(found[place][1], np.uint8)
        assert view.ctypes.data == array.ctypes.data


def test_what_is_iterated_can_be_built_again() -> None:
    block = rows.build([{"uri": "a", "frames": b"abc", "audio": b""}, {"uri": "b"}], rows.DECODED)
    assert rows.build(list(rows.iterate(block)), rows.DECODED).equals(block)


def test_a_block_in_pieces_is_iterated_in_order() -> None:
    pieces = [rows.build([{"uri": name}], rows.IDENTITY) for name in "abc"]
    whole = pa.concat_tables([rows.IDENTITY.empty_table(), *pieces])
    assert [row["uri"] for row in rows.iterate(whole)] == list("abc")


def test_missing_columns_are_null_and_other_columns_left_out() -> None:
    block = rows.build([{"uri": "u", "another": 1}], rows.KEPT)
    (row,) = rows.iterate(block)
    assert row == {**dict.fromkeys(rows.KEPT.names), "uri": "u"}


def test_a_failed_row_keeps_what_it_had() -> None:
    row = {"uri": "u", "error_type": None}
    failed = rows.failed(row, "decode", "truncated", "u: cut")
    assert row == {"uri": "u", "error_type": None}
    assert failed == {
        "uri": "u",
        "error_stage": "decode",
        "error_type": "truncated",
        "error_message": "u: cut",
    }


def _plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_plain(field.type) for field in kind)
    return not isinstance(kind, pa.BaseExtensionType)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_is_a_plain_arrow_type_and_survives_parquet(name: str, tmp_path: Path) -> None:
    schema = SCHEMAS[name]
    assert all(_plain(field.type) for field in schema)
    assert len(set(schema.names)) == len(schema.names)
    pq.write_table(rows.build([{}, {}], schema), tmp_path / "x.parquet")
    back = pq.read_table(tmp_path / "x.parquet")
    assert back.schema.equals(schema)
    assert back.to_pylist() == [dict.fromkeys(schema.names)] * 2
