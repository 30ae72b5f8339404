"""The store of answers: `<output>/<run_id>/`, its commit marker, and what readers see of it.

A run is visible when `_COMMITTED`, its list of files, lies in its folder; it is written last. The
files of a run that was killed are complete but in no list: the next run adopts them in its own.
A compaction is a run whose list also says which files of others it replaces: from then on they
count no more, and they are deleted when nobody can still be reading them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial

import pyarrow as pa

from pipeline import rows
from pipeline.errors import StartupError
from pipeline.keys import plain
from pipeline.parquet import count_rows, read_columns, read_each
from pipeline.readers_view import seen_by_readers
from pipeline.storage import Storage, StorageError, join

log = logging.getLogger(__name__)

COMMITTED = "_COMMITTED"


@dataclass(frozen=True)
class Commit:
    """What `_COMMITTED` holds, as JSON. `files` are relative to the run's folder."""

    run_id: str
    files: list[str]  # "../<run_id>/<name>": adopted from a run that was killed
    num_answers: int  # rows in `files`, before readers drop the superseded ones
    num_videos: int
    created_at: str
    replaces: list[str] = field(default_factory=list)  # files that count no more: compacted

    def listed(self, output: str) -> set[str]:
        """Return the uris of `files`."""
        return {self._resolve(output, file) for file in self.files}

    def replaced(self, output: str) -> set[str]:
        """Return the uris of `replaces`."""
        return {self._resolve(output, file) for file in self.replaces}

    def _resolve(self, output: str, file: str) -> str:
        output = plain(output)
        adopted = file.startswith("../")
        return join(output, file[3:]) if adopted else join(output, self.run_id, file)


@dataclass(frozen=True)
class OutputFiles:
    """The answers-*.parquet and videos-*.parquet files of an output, by uri, sorted."""

    committed: tuple[str, ...]
    orphans: tuple[str, ...]  # in no run's list: of a run that was killed, or still goes on
    sizes: Mapping[str, int]  # in bytes, of those that exist


def find_files(output: str, storage: Storage) -> OutputFiles:
    """List the files of all runs; an output that does not exist yet has none.

    Raises StartupError when the output cannot be listed.
    """
    found, commits = list_output(output, storage)
    listed = {uri for commit in commits.values() for uri in commit.listed(output)}
    replaced = {uri for commit in commits.values() for uri in commit.replaced(output)}
    return OutputFiles(
        tuple(sorted(listed - replaced)), tuple(sorted(found.keys() - listed - replaced)), found
    )


def list_output(output: str, storage: Storage) -> tuple[dict[str, int], dict[str, Commit]]:
    """Return the size of each answers and videos file by uri, and each marker by its run.

    Raises StartupError when the output cannot be listed or a marker is broken.
    """
    output = plain(output)
    found: dict[str, int] = {}
    commits: dict[str, Commit] = {}
    try:
        for info in storage.list(output, suffixes=(".parquet", COMMITTED.lower())):
            run_id, _, name = info.uri[len(output) + 1 :].partition("/")
            if name == COMMITTED:
                marker = _read_marker(storage, info.uri)
                if marker:
                    commits[run_id] = marker
            elif "/" not in name and name.startswith(("answers-", "videos-")):
                found[info.uri] = info.size_bytes
    except StorageError as error:
        if error.error_type != "not_found":
            raise StartupError(f"output={output}: it cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        raise StartupError(f"output={output}: the marker {info.uri} is broken: {error}") from error
    return found, commits


def _read_marker(storage: Storage, uri: str) -> Commit | None:
    try:
        return Commit(**json.loads(storage.read(uri)))
    except StorageError as error:
        if error.error_type != "not_found":
            raise
        return None  # deleted since it was listed: another marker replaces all that it names


def commit(
    storage: Storage,
    output: str,
    run_id: str,
    orphans: Sequence[str] = (),
    replaces: Sequence[str] = (),
) -> Commit:
    """Make the run's files and the adopted `orphans` visible, at once and for good.

    In the same moment the files of other runs that it `replaces` count no more.
    """
    output = plain(output)
    folder = join(output, run_id)
    own = find_run_files(storage, folder)
    files = [*own, *(uri for uri in orphans if uri not in own)]
    lengths = dict(read_each(files, partial(count_rows, storage)))
    answers = [uri for uri in files if is_answers(uri)]

    def relative(uri: str) -> str:
        return uri[len(folder) + 1 :] if uri in own else f"../{uri[len(output) + 1 :]}"

    done = Commit(
        run_id=run_id,
        files=[relative(uri) for uri in files],
        num_answers=sum(lengths[uri] for uri in answers),
        num_videos=sum(lengths.values()) - sum(lengths[uri] for uri in answers),
        created_at=datetime.now(UTC).isoformat(),
        replaces=[relative(uri) for uri in replaces],
    )
    storage.write(join(folder, COMMITTED), (json.dumps(asdict(done), indent=2) + "\n").encode())
    return done


def find_run_files(storage: Storage, folder: str) -> list[str]:
    """Return the answers and videos files that a run wrote itself; none if it wrote nothing."""
    folder = plain(folder)
    try:
        uris = [info.uri for info in storage.list(folder, suffixes=(".parquet",))]
    except StorageError as error:
        if error.error_type != "not_found":
            raise
        return []
    prefixes = (join(folder, "answers-"), join(folder, "videos-"))
    return [uri for uri in uris if uri.startswith(prefixes)]


def is_answers(uri: str) -> bool:
    """Say whether a file of a run holds answers; the others hold videos."""
    return uri.rpartition("/")[2].startswith("answers-")


def read_answers(output: str, storage: Storage, *, committed_only: bool = True) -> pa.Table:
    """Return what readers see: one row of rows.ANSWERS for each (video_key, prompt_id).

    Where `media.window_s` cut the video, `video_key` is its window's; start_s and end_s say which.
    An answer beats a failure, then the latest row wins. When an object has changed, or is cut in
    another way, its newer rows supersede the older ones of the same uri; an object that could not
    be found or named (a failure of `source`) supersedes nothing. What was answered about an object
    before it was deleted is gone. With `committed_only=False` also rows of runs that were killed or
    still go on.
    """
    files = find_files(output, storage)
    uris = [*files.committed, *(() if committed_only else files.orphans)]
    uris = [uri for uri in uris if is_answers(uri)]
    read = read_each(uris, partial(read_columns, storage, columns=rows.ANSWERS.names))
    tables = (rows.completed(table, rows.ANSWERS.names, rows.ANSWERS) for _, table in read)
    return seen_by_readers(pa.concat_tables([rows.ANSWERS.empty_table(), *tables]))
