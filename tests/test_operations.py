"""The page for operators names commands, keys and error types that exist."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import CaptionConfig, CompactConfig, ShowConfig, VerifyConfig
from pipeline.report import Report
from pipeline.retry import COSTLY, FINAL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SCHEMAS = {"compact": CompactConfig, "show_answers": ShowConfig, "verify": VerifyConfig}


@pytest.mark.parametrize("command", re.findall(r"`python jobs/(.*?)`", PAGE))
def test_commands_are_jobs_with_keys_they_know(command: str) -> None:
    job, *arguments = command.replace("...", "x").split()
    assert (ROOT / "jobs" / job).is_file()
    cli.load(SCHEMAS[job.removesuffix(".py")], arguments)


def test_keys_are_those_of_the_configuration() -> None:
    known = set(re.findall(r"^\| `([a-z_.]+)`", cli.key_table(CaptionConfig), re.MULTILINE))
    groups = {key.partition(".")[0] for key in known if "." in key}
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", PAGE))
    files = {"report.json", *(job.name for job in (ROOT / "jobs").glob("*.py"))}
    assert {key for key in named if key.partition(".")[0] in groups} <= known
    assert {key for key in named - known if key not in files} == set()


def test_alerts_read_what_a_report_has() -> None:
    (sentence,) = re.findall(r"For alerts read\s(.*?) in\s`<output>", PAGE, re.DOTALL)
    named = re.findall(r"`(\w+)`", sentence)
    assert len(named) == 5
    assert set(named) <= {field.name for field in fields(Report)}


def _error_types(source: str) -> set[str]:
    """Return the words that a file gives to failures."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            place = {"DecodeError": 0, "StorageError": 0, "BoundaryError": 0}.get(name)
            place = 2 if name in ("failed", "_failed") else place
            given = [] if place is None else node.args[place : place + 1]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            given = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "error_type"]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("error_type']"):
            given = [node.value]
        else:
            continue
        words = [word.value for word in given if isinstance(word, ast.Constant)]
        found |= {word for word in words if isinstance(word, str)}
    return found


def test_every_error_type_has_a_line() -> None:
    types = FINAL | COSTLY
    for path in (ROOT / "pipeline").rglob("*.py"):
        types |= _error_types(path.read_text(encoding="utf-8"))
    assert {"not_found", "outside_root", "too_long", "bad_manifest_row", "cache_corrupt"} <= types
    assert {word for word in types if f"`{word}`" not in PAGE} == set()


def test_what_is_tried_again_is_what_the_code_tries() -> None:
    for line in re.findall(r"^\| (`[a-z_`, ]+) \| (.*?) \|", PAGE, re.MULTILINE):
        types, said = set(re.findall(r"`([a-z_]+)`", line[0])), line[1]
        if types & FINAL:
            assert types <= FINAL
            assert said in ("when the object or a setting changes", "likewise")
        if types & COSTLY:
            assert types <= COSTLY
            assert said == "`retry.max_attempts` times"
