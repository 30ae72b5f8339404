"""The README's table of keys is the schema's, its file tree the repository's.

Run as a script, this file writes both anew.
"""

import ast
from pathlib import Path

from pipeline import cli
from pipeline.config import CaptionConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# What is no module, or not worth a line a file.
OTHERS = {
    "infra/": "Dockerfile, KubeRay manifests, nightly job, crontab line; see infra/README.md.",
    "docs/": "architecture, engines, security, operations by symptom, training, results, log.",
    "tests/": "mirrors the sources; tests/golden holds the reference's vectors.",
    "Makefile": "the verbs: demo, test, chaos, check, fix.",
    "pyproject.toml": "dependencies with their reasons, and the tools' settings.",
    "constraints.txt": "exact versions.",
    "CHANGELOG.md": "what a user meets, and when it changed.",
}


def with_generated(readme: str, name: str, content: str) -> str:
    """Return `readme` with what stands between the markers of `name` replaced."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = readme.partition(opening)
    _, _, after = rest.partition(closing)
    return f"{before}{opening}\n{content}\n{closing}{after}"


def file_tree() -> str:
    """Return a line for every module: the first of its docstring."""
    lines = {}
    for package in ("omnisift", "pipeline", "jobs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            name = str(path.relative_to(ROOT))
            lines[name.removesuffix("__init__.py")] = summary
    width = max(map(len, lines)) + 2
    rows = (f"{name:<{width}}{summary}" for name, summary in {**lines, **OTHERS}.items())
    return "\n".join(["```", *rows, "```"])


def generated(readme: str) -> str:
    """Return `readme` with all its generated parts as they should be."""
    readme = with_generated(readme, "keys", cli.key_table(CaptionConfig))
    return with_generated(readme, "tree", file_tree())


def test_readme_lists_every_key_and_file_as_they_are() -> None:
    readme = README.read_text(encoding="utf-8")
    for name in ("keys", "tree"):
        assert readme.count(f"<!-- {name} -->") == readme.count(f"<!-- /{name} -->") == 1
    assert readme == generated(readme), "keys or files changed: run `make fix`"


def test_the_other_files_of_the_tree_exist() -> None:
    assert all((ROOT / name).exists() for name in OTHERS)


if __name__ == "__main__":
    README.write_text(generated(README.read_text(encoding="utf-8")), encoding="utf-8")
