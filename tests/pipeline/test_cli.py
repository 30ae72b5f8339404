import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import cli


@dataclass(frozen=True)
class Inner:
    """What lies inside."""

    fps: float = field(default=2.0, metadata={"help": "frames a second"})
    count: int = field(default=3, metadata={"help": "how many"})
    share: float | None = field(default=None, metadata={"help": "a share or null"})
    strict: bool = field(default=False, metadata={"help": "whether to refuse"})
    endings: list[str] = field(
        default_factory=lambda: [".mp4", ".mov"], metadata={"help": "file endings | suffixes"}
    )
    revision: str = field(default="main", metadata={"help": "a revision"})

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"inner.fps must be positive, got {self.fps!r}")


@dataclass(frozen=True)
class Outer:
    """Everything a test is told."""

    prompt: str = field(default="", metadata={"help": "the question, under <output>"})
    inner: Inner = field(default=Inner(), metadata={"help": ""})


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that stderr holds after `argv` was refused."""
    with pytest.raises(SystemExit) as stopped:
        cli.load(Outer, argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def write(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_arguments_the_defaults_hold() -> None:
    assert cli.load(Outer, []) == Outer()


def test_arguments_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "prompt: from file\ninner:\n  fps: 4\n  count: 7\ninner.share: 0.5\n")
    # the argument stands in front of the file: its rank, not its place, decides
    loaded = cli.load(Outer, ["inner.fps=1e-1", "--config", file, "inner.strict=true"])
    expected = Inner(fps=0.1, count=7, share=0.5, strict=True)
    assert loaded == Outer(prompt="from file", inner=expected)


def test_of_two_files_the_later_wins(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("prompt: first\ninner: {count: 1}\n")
    second = write(tmp_path, "prompt: second\ninner:\n")
    loaded = cli.load(Outer, [f"--config={first}", f"--config={second}"])
    assert loaded == Outer(prompt="second", inner=Inner(count=1))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert cli.load(Outer, ["--config", write(tmp_path, "")]) == Outer()


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("${}\\'\"=,:#"))))
@example("What colour is it, and {why}?")
@example("a=b, c: [d] # e")
@example("'quoted' and \"quoted\"")
@example("${inner.fps} \\${x} \\\\${y}\\")
@example("${oc.env:HOME}")
@example(" null ")
@example("Wie spät ist es auf 東京 🎬?\nSecond line")
def test_text_arrives_verbatim(text: str) -> None:
    if text != "???":
        assert cli.load(Outer, [f"prompt={text}"]).prompt == text


@pytest.mark.parametrize("text", ["${inner.fps}", "a: b, {c}", "it's \\${so}"])
def test_text_in_a_file_is_not_interpolated(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, f"prompt: |-\n  {text}\n")
    assert cli.load(Outer, ["--config", file]).prompt == text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("inner.share=null", Inner(share=None)),
        ("inner.share=.5", Inner(share=0.5)),
        ("inner.count=-2", Inner(count=-2)),
        ("inner.strict=no", Inner(strict=False)),
        ("inner.endings=[.ts, .webm]", Inner(endings=[".ts", ".webm"])),
        ("inner.endings=['a ${b}']", Inner(endings=["a ${b}"])),
        ("inner.endings=[]", Inner(endings=[])),
        ("inner.revision=0123e4", Inner(revision="0123e4")),
    ],
)
def test_values_take_the_type_of_their_key(argument: str, expected: Inner) -> None:
    assert cli.load(Outer, [argument]).inner == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("promt", "prompt"), ("inner.fsp", "inner.fps"), ("endings", "inner.endings")],
)
def test_an_unknown_key_is_named_with_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, nearest: str
) -> None:
    expected = f"unknown key {name}; did you mean {nearest}?"
    assert refusal(capsys, f"{name}=1") == expected
    assert refusal(capsys, "--config", write(tmp_path, f"{name}: 1\n")) == expected


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("zzz=1", "unknown key zzz; --help lists them all"),
        ("inner.fps=fast", "inner.fps must be a number, got 'fast'"),
        ("inner.fps=", "inner.fps must be a number, got null"),
        ("inner.fps=[", "inner.fps must be a number, got '['"),
        ("inner.fps=${inner.count}", "inner.fps must be a number, got '${inner.count}'"),
        ("inner.count=2.5", "inner.count must be an integer, got 2.5"),
        ("inner.share=x", "inner.share must be a number or null, got 'x'"),
        ("inner.strict=maybe", "inner.strict must be true or false, got 'maybe'"),
        ("inner.endings=.mp4", "inner.endings must be a list of text, like [a,b], got '.mp4'"),
        ("inner.endings=[1]", "inner.endings must be a list of text, like [a,b], got [1]"),
        ("inner.fps=-1", "inner.fps must be positive, got -1.0"),
        ("inner.fps=.nan", "inner.fps must be positive, got nan"),
        ("prompt", "expected key=value, got 'prompt'"),
        ("--fps=3", "unknown option --fps; there are --config FILE and --help"),
        ("--config", "--config needs a file"),
        ("prompt=???", "prompt cannot be '???': it is OmegaConf's sign for a missing value"),
    ],
)
def test_a_refusal_is_one_line(
    capsys: pytest.CaptureFixture[str], argument: str, line: str
) -> None:
    assert refusal(capsys, argument) == line


def test_a_group_is_no_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refusal(capsys, "inner=3").startswith("inner is a group of keys: inner.fps, inner.count")
    file = write(tmp_path, "inner: 3\n")
    assert refusal(capsys, "--config", file).startswith("inner is a group of keys: inner.fps")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prompt: [1\n", "is not YAML, line 2: did not find expected ',' or ']'"),
        ("prompt: a\nprompt: b\n", "is not YAML, line 2: found duplicate key prompt"),
        ("- prompt\n", "must hold keys and values"),
    ],
)
def test_a_broken_file_is_named_with_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, line: str
) -> None:
    file = write(tmp_path, text)
    assert refusal(capsys, "--config", file) == f"--config {file} {line}"


@pytest.mark.parametrize(("text", "read"), [("0123", 83), ("1e10", 1e10), ("yes", True)])
def test_text_that_yaml_would_alter_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, read: object
) -> None:
    file = write(tmp_path, f"inner: {{revision: {text}}}\n")
    expected = f"inner.revision must be text, got {read!r}: put it in quotes"
    assert refusal(capsys, "--config", file) == expected
    file = write(tmp_path, f"inner: {{revision: '{text}'}}\n")
    assert cli.load(Outer, ["--config", file]).inner.revision == text


def test_a_file_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "missing.yaml"
    expected = f"--config {missing} cannot be read: No such file or directory"
    assert refusal(capsys, "--config", str(missing)) == expected
    assert refusal(capsys, f"--config={tmp_path}").endswith("cannot be read: Is a directory")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refusal(capsys, f"--config={binary}") == f"--config {binary} is not UTF-8 text"


def test_help_has_every_key_with_type_default_and_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stopped:
        cli.load(Outer, ["unknown=1", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert max(len(line) for line in out.splitlines()) <= 60
    assert "\ninner: What lies inside.\n" in out
    flat = re.sub(r"\s+", " ", out)
    for entry in (
        'prompt (text; default "") the question, under <output>',
        "inner.fps (number; default 2.0) frames a second",
        "inner.count (integer; default 3) how many",
        "inner.share (number or null; default null) a share or null",
        "inner.strict (true or false; default false) whether to refuse",
        "inner.endings (list of text; default [.mp4, .mov]) file endings | suffixes",
        "inner.revision (text; default main) a revision",
    ):
        assert f" {entry} " in f"{flat} "


def test_the_table_is_markdown_with_a_row_a_key() -> None:
    table = cli.key_table(Outer).splitlines()
    assert table[0] == "| key | type | default | meaning |"
    assert table[2] == '| `prompt` | text | `""` | the question, under \\<output> |'
    assert table[3] == "| `inner.fps` | number | `2.0` | frames a second |"
    # a cell holds no bare bar: five unescaped ones bound four cells
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in table)
    assert len(table) == 2 + 7
