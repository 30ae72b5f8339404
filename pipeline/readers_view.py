"""Which of the rows of all runs readers see: exactly one for each (video_key, prompt_id)."""

from collections import defaultdict
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.keys import window_key

# `status` of a row that says that its uri's object is gone. Of such a row readers see nothing.
DELETED = "deleted"


def seen_by_readers(table: pa.Table) -> pa.Table:
    """Keep of the rows of an output those that readers see: see answers.read_answers."""
    return seen_of_objects(current_of_uris(table))


def current_of_uris(table: pa.Table) -> pa.Table:
    """Do the first half, for which all rows of a uri are needed, but only those."""
    return _current(undeleted(table))


def seen_of_objects(table: pa.Table) -> pa.Table:
    """Do the second half, for which all rows of an object are needed that the first half kept."""
    return _uncut(_latest(table))


def undeleted(table: pa.Table) -> pa.Table:
    """Drop the deletions, and every row about their uris that is not later than they are."""
    deletions = table.filter(pc.equal(table.column("status"), DELETED))
    if not deletions.num_rows:
        return table
    last = deletions.group_by("uri").aggregate([("created_at", "max")])
    place = pc.index_in(table.column("uri"), last.column("uri").combine_chunks())
    deleted_at = pc.take(last.column("created_at_max"), place)
    return table.filter(pc.fill_null(pc.greater(table.column("created_at"), deleted_at), True))


def _latest(table: pa.Table) -> pa.Table:
    """Keep one row of each (video_key, prompt_id): the best in the order failed, ok; old, new."""
    ok = pc.equal(table.column("status"), "ok")
    return last_of(table, ["video_key", "prompt_id"], first=ok)


def _current(table: pa.Table) -> pa.Table:
    """Keep the rows of the newest object of their uri, as it was last cut into windows."""
    newest = newest_of_uri(table)
    version_of_uri = (
        _versions(newest)
        .combine_chunks()
        .take(pc.index_in(table.column("uri"), newest.column("uri")).combine_chunks())
    )
    return table.filter(pc.equal(_versions(table), version_of_uri))


def objects(table: pa.Table) -> pa.ChunkedArray:
    """Return the key of each row's object: `video_key` is that of its window, if it is cut."""
    return pc.coalesce(table.column("object_key"), table.column("video_key"))


def _versions(table: pa.Table) -> pa.ChunkedArray:
    cut = pc.cast(pc.fill_null(table.column("window_s"), 0.0), pa.string())
    return pc.binary_join_element_wise(objects(table), cut, "/")


def _uncut(table: pa.Table) -> pa.Table:
    """Drop the rows of whole videos whose windows all have a row of their own, one of them later.

    A worker that dies behind some windows fails the whole video for the others: that failure is all
    that readers see of them, until the same question has been put to the last of them.
    """
    place = pa.array(np.arange(table.num_rows))
    own = table.select(["video_key", "window_s", "start_s", "prompt_id", "created_at"])
    own = own.append_column("object", objects(table)).append_column("place", place)
    in_windows = pc.is_valid(own.column("start_s"))
    whole, windows = own.filter(pc.invert(in_windows)), own.filter(in_windows)
    whole = whole.filter(_is_one_of(whole, windows))
    windows = windows.filter(_is_one_of(windows, whole))
    all_since = _all_windows_since(windows)
    hidden = [
        row["place"]
        for row in whole.to_pylist()
        for since in all_since.get((row["object"], row["prompt_id"]), ())
        if row["created_at"] < since
    ]
    return table.filter(pc.invert(pc.is_in(place, pa.array(hidden, pa.int64()))))


def _is_one_of(table: pa.Table, others: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(table.column("object"), others.column("object").combine_chunks())


def _all_windows_since(windows: pa.Table) -> dict[tuple[str, str], list[datetime]]:
    """Return when the latest row was written, of each question that all windows have a row for.

    It is a list, since a copy of an object may have been cut in another way.
    """
    of_question = defaultdict(list)
    for row in windows.to_pylist():
        of_question[(row["object"], row["prompt_id"], row["window_s"])].append(row)
    since = defaultdict(list)
    for (key, prompt_id, window_s), found in of_question.items():
        numbers = {round(row["start_s"] / window_s) for row in found}
        last = max(numbers)
        ends = window_key(key, window_s, last, last=True) in {row["video_key"] for row in found}
        if ends and len(numbers) == last + 1:
            since[(key, prompt_id)].append(max(row["created_at"] for row in found))
    return since


def newest_of_uri(table: pa.Table) -> pa.Table:
    """Keep the row of each uri whose key is the current one; a found object beats a missing one."""
    probed = pc.fill_null(pc.not_equal(table.column("error_stage"), "source"), True)
    return last_of(table, ["uri"], first=probed)


def last_of(table: pa.Table, group: list[str], *, first: pa.ChunkedArray) -> pa.Table:
    """Keep the last row of each group, ordered by `first`, created_at, and place in the table."""
    place = pa.array(np.arange(table.num_rows))
    order = pc.sort_indices(
        pa.table([pc.cast(first, pa.int32()), table.column("created_at"), place], ["f", "c", "p"]),
        sort_keys=[("f", "ascending"), ("c", "ascending"), ("p", "ascending")],
    )
    ranked = table.select(group).take(order).append_column("place", place)
    last = ranked.group_by(group).aggregate([("place", "max")]).column("place_max")
    return table.take(pa.array(np.sort(np.asarray(order)[np.asarray(last)])))
