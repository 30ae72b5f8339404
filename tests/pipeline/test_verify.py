"""verify.py finds every kind of damage, and none where there is none."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import verify
from pipeline import keys, rows, token_cache
from pipeline.answers import COMMITTED, commit
from pipeline.config import StorageConfig
from pipeline.storage import Storage

STORAGE = Storage(StorageConfig())
INGREDIENTS: dict[str, keys.Ingredient] = {"model": "m"}
AT = datetime(2026, 1, 1, tzinfo=UTC)


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _cached(name: str) -> dict[str, Any]:
    row = {
        "video_key": _key(name),
        "uri": f"s3://b/{name}",
        "tokens": name.encode() * 400,
        "token_dtype": "float32",
        "token_shape": [100, 1],
        "positions": [[0]] * 3,
        "modality": [1],
        "next_position": 1,
        "kept_index": [0],
        "run_id": "run",
        "created_at": AT,
    }
    return {**row, "sha256": token_cache.digest(row)}


def _row(name: str, prompt_id: str) -> dict[str, Any]:
    own = {"status": "ok", "attempts": 1, "run_id": "run-1", "created_at": AT, "num_prompts": 2}
    return {"video_key": _key(name), "uri": f"s3://b/{name}", "prompt_id": prompt_id, **own}


def _write(path: Path, table: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, write_page_checksum=True, compression="none")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output of a run and a cache without a fault."""
    output = tmp_path / "output"
    folder = output / "cache" / keys.fingerprint(INGREDIENTS)
    token_cache.write_fingerprint(STORAGE, str(folder), INGREDIENTS)
    token_cache.write_part(STORAGE, str(folder), "run", rows.build([_cached("a")], rows.KEPT))
    asked = [_row(name, prompt) for name in "ab" for prompt in "pq"]
    _write(output / "run-1" / "answers-0.parquet", rows.build(asked, rows.ANSWERS))
    _write(output / "run-1" / "videos-0.parquet", rows.build(asked[::2], rows.VIDEOS))
    _write(output / "run-0" / "answers-9.parquet", rows.build(asked[:1], rows.ANSWERS))  # killed
    commit(STORAGE, str(output), "run-1")
    return output


def _lines(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str]]:
    monkeypatch.setattr("sys.argv", ["verify.py", f"output={output}"])
    status = verify.main()
    return status, capsys.readouterr().out.splitlines()


def test_what_is_whole_has_no_faults(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _lines(output, capsys, monkeypatch)
    assert found == (0, ["0 faults in the answers and in 1 caches"])
    shutil.rmtree(output / "cache")
    assert _lines(output, capsys, monkeypatch)[0] == 0


def _part(output: Path) -> Path:
    (part,) = (output / "cache").rglob("part-*.parquet")
    return part


def _flip(path: Path, what: bytes) -> None:
    data = bytearray(path.read_bytes())
    place = data.find(what)  # the page; the footer's statistics have no checksum
    assert place > 0
    data[place] ^= 1
    path.write_bytes(data)


def _other_tokens(output: Path) -> None:
    row = {**_cached("a"), "tokens": b"b" * 400}
    token_cache.write_rows(STORAGE, str(_part(output)), [rows.build([row], rows.CACHED)])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _other_columns(output: Path) -> None:
    table = pq.read_table(output / "run-1" / "videos-0.parquet").drop_columns(["etag"])
    _write(output / "run-1" / "videos-0.parquet", table)


def _answer_lost(output: Path) -> None:
    table = pq.read_table(output / "run-1" / "answers-0.parquet").slice(1)
    _write(output / "run-1" / "answers-0.parquet", table)


def _other_ingredients(output: Path) -> None:
    (path,) = (output / "cache").rglob("fingerprint.json")
    path.write_text(json.dumps({"model": "another"}))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a list names a file that is gone": (
        lambda output: (output / "run-1" / "videos-0.parquet").unlink(),
        "_COMMITTED: names .*videos-0.parquet, which does not exist",
    ),
    "a flipped bit in an answer": (
        lambda output: _flip(output / "run-1" / "answers-0.parquet", b"s3://b/b"),
        "answers-0.parquet: cannot be read: .*checksum|CRC",
    ),
    "a file that is cut": (
        lambda output: _cut(output / "run-1" / "answers-0.parquet"),
        "answers-0.parquet: cannot be read",
    ),
    "another schema": (_other_columns, "videos-0.parquet: cannot be read: its columns are"),
    "an answer too few": (_answer_lost, f"video {_key('a')} was asked 2 prompts, it has 1 answers"),
    "other tokens": (_other_tokens, "row 0: sha256 is"),
    "a cut cache file": (lambda output: _cut(_part(output)), "part-.*: cannot be read"),
    "other ingredients": (_other_ingredients, "fingerprint.json: its ingredients are those of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_said(
    name: str, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = FAULTS[name]
    damage(output)
    status, lines = _lines(output, capsys, monkeypatch)
    assert status == 1
    faults = [line for line in lines if line.startswith("fault: ")]
    assert lines[-1].startswith(f"{len(faults)} faults")
    assert any(re.search(message, line) for line in faults), lines


def test_a_damaged_row_that_runs_know_of_is_no_fault(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _other_tokens(output)
    token_cache.bury(STORAGE, str(_part(output)), 0, video_key=_key("a"), reason="damaged")
    assert _lines(output, capsys, monkeypatch)[0] == 0


def test_a_broken_marker_ends_the_check(
    output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (output / "run-1" / COMMITTED).write_text("{}")
    assert _lines(output, capsys, monkeypatch)[0] == 2
