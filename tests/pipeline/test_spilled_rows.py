import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import spilled_rows
from pipeline.errors import StartupError
from pipeline.spilled_rows import SpilledRows

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])

some_texts = st.lists(st.none() | st.text(max_size=3), max_size=30)


def _tables(texts: list[str | None], rows_a_table: int) -> list[pa.Table]:
    whole = pa.table({"text": texts, "number": range(len(texts))}, schema=SCHEMA)
    return [whole.slice(start, rows_a_table) for start in range(0, len(texts), rows_a_table)]


@settings(max_examples=60, deadline=None)
@given(some_texts, st.integers(1, 5), st.integers(1, 40))
def test_rows_come_back_in_their_order_each_time(
    texts: list[str | None], rows_a_table: int, in_memory: int
) -> None:
    with mock.patch.object(spilled_rows, "IN_MEMORY", in_memory):
        stored = SpilledRows(SCHEMA)
        for table in _tables(texts, rows_a_table):
            stored.add(table)
        for _ in range(2):
            found = pa.concat_tables([SCHEMA.empty_table(), *stored])
            assert found.column("text").to_pylist() == texts
            assert found.column("number").to_pylist() == list(range(len(texts)))
    assert len(stored) == len(texts)


@settings(max_examples=60, deadline=None)
@given(some_texts, st.integers(1, 5), st.integers(1, 40))
def test_rows_of_the_same_text_come_together_in_their_order(
    texts: list[str | None], rows_a_table: int, in_memory: int
) -> None:
    expected: dict[str | None, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        expected[text].append(number)
    with mock.patch.object(spilled_rows, "IN_MEMORY", in_memory):
        stored = SpilledRows(SCHEMA, together="text")
        for table in _tables(texts, rows_a_table):
            stored.add(table)
        found: dict[str | None, list[int]] = {}
        for table in stored:
            of_text: dict[str | None, list[int]] = defaultdict(list)
            for row in table.to_pylist():
                of_text[row["text"]].append(row["number"])
            assert not found.keys() & of_text.keys()
            found |= of_text
    assert found == expected


def test_what_is_spilled_leaves_nothing_behind_and_a_full_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled_rows, "IN_MEMORY", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = SpilledRows(SCHEMA)
    for table in _tables(["a", "b", "c"], 1):
        stored.add(table)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    refused = SpilledRows(SCHEMA)
    with pytest.raises(StartupError, match="TMPDIR"):
        refused.add(_tables(["a", "b"], 2)[0])
