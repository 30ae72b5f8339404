"""The README's table of keys is the schema's. Run as a script, this file writes it anew."""

from pathlib import Path

from pipeline import cli
from pipeline.config import CaptionConfig

README = Path(__file__).parents[1] / "README.md"
OPEN, CLOSE = "<!-- keys -->", "<!-- /keys -->"


def with_table(readme: str) -> str:
    """Return `readme` with the table between its two markers replaced by the schema's."""
    before, _, rest = readme.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    return f"{before}{OPEN}\n{cli.key_table(CaptionConfig)}\n{CLOSE}{after}"


def test_readme_lists_every_key_as_the_schema_has_it() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme.count(OPEN) == readme.count(CLOSE) == 1
    assert readme == with_table(readme), "the schema changed: run `make fix`"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
