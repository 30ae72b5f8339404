"""Where the pipeline may read: the places, and the names, that a manifest or a listing may give."""

import os
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import CaptionConfig
from pipeline.manifest import folder_of, is_manifest
from pipeline.storage import S3

_FILE = "file://"
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BoundaryError(Exception):
    """A place that is not read: a stable `error_type`, and what was found and expected."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Roots:
    """Prefixes outside which no video is read."""

    local: tuple[str, ...]  # as configured; links in them are followed
    s3: tuple[str, ...] | None  # each ends in a slash; None: whatever the credentials may read

    def check(self, uri: str) -> None:
        """Raise BoundaryError for a uri that this run may not read.

        Types: outside_root; bad_name, for control characters, which could forge a line of a log or
        steer a terminal; not_a_video, for what is no file.
        """
        if not _is_plain_text(uri):
            raise BoundaryError(
                "bad_name", f"{shown(uri)}: the name must be UTF-8 without control characters"
            )
        if not uri.startswith(S3):
            self.resolve(uri)
        elif self.s3 is not None and not uri.startswith(self.s3):
            raise _outside(uri, self.s3)

    def resolve(self, uri: str) -> Path:
        """Return the real path of a local uri, all links followed; it may be that of nothing.

        Raises BoundaryError outside_root, or not_a_video for a pipe or a device, which would keep
        a reader waiting.
        """
        path = _real(uri.removeprefix(_FILE))
        if not any(path.is_relative_to(_real(root)) for root in self.local):
            raise _outside(uri, self.local)
        try:
            kind = stat.S_IFMT(path.stat().st_mode)
        except OSError:  # not there, or not to be seen: who opens it says so
            return path
        if kind in _KINDS:
            raise BoundaryError("not_a_video", f"{uri}: expected a file, found {_KINDS[kind]}")
        return path


# Of a list that the operator wrote, as the data to train on: any file, any bucket.
ANYWHERE = Roots(("/",), None)


def roots_of(config: CaptionConfig) -> Roots:
    """Return the roots in force: those configured, or the source's own folder and any bucket."""
    if config.listing.roots:
        s3 = tuple(root.rstrip("/") + "/" for root in config.listing.roots if root.startswith(S3))
        local = [root for root in config.listing.roots if not root.startswith(S3)]
        return Roots(tuple(root.removeprefix(_FILE) for root in local), s3)
    source = config.source
    if source.startswith(S3):
        return Roots((), None)
    folder = folder_of(source) if is_manifest(source) else source
    return Roots((folder.removeprefix(_FILE),), None)


def shown(name: str) -> str:
    """Return a name as a message may show it: what is not plain text is escaped."""
    return "".join(c if _is_plain(c) else ascii(c)[1:-1] for c in name)


def _real(path: str) -> Path:
    # Path.resolve raises for links in a circle, and only in some versions of Python.
    return Path(os.path.realpath(path))


def _is_plain_text(name: str) -> bool:
    return all(map(_is_plain, name))


def _is_plain(character: str) -> bool:
    # Cc: control characters. Cs: lone surrogates, as Python reads bytes that are not UTF-8.
    return unicodedata.category(character) not in ("Cc", "Cs")


def _outside(uri: str, roots: tuple[str, ...]) -> BoundaryError:
    allowed = ", ".join(roots) or "none (a source in S3 names nothing on a disk)"
    return BoundaryError(
        "outside_root",
        f"{uri}: it does not lie under the places that videos are read from: {allowed}; move it, "
        "remove the link, or add its folder to listing.roots",
    )
