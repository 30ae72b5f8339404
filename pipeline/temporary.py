"""Files without a name in the temporary folder: nothing is left of a killed process."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from pipeline.errors import StartupError


def temporary_file() -> BinaryIO:
    """Open a file that is gone as soon as it is closed."""
    with room():
        return cast("BinaryIO", tempfile.TemporaryFile())


@contextmanager
def room() -> Iterator[None]:
    """Raise StartupError where the temporary folder has no room for what is written."""
    try:
        yield
    except OSError as error:
        raise StartupError(
            f"what earlier runs left is more than is held in memory, and the temporary folder "
            f"{tempfile.gettempdir()} cannot take it: {error}; make room there (docs/operations.md "
            "says how much), or set TMPDIR"
        ) from error
