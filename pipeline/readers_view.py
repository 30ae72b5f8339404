"""Which of the rows of all runs readers see: exactly one for each (video_key, prompt_id)."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    return _latest(_uncut(table))


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
    """Drop failures of whole videos that a later run has cut into windows after all."""
    in_windows = pc.is_valid(table.column("start_s"))
    if not pc.any(in_windows).as_py():
        return table
    own = table.append_column("object", objects(table))
    last = own.filter(in_windows).group_by("object").aggregate([("created_at", "max")])
    place = pc.index_in(own.column("object"), last.column("object").combine_chunks())
    cut_at = pc.take(last.column("created_at_max"), place)
    superseded = pc.less(table.column("created_at"), cut_at)
    hidden = pc.and_(pc.invert(in_windows), pc.fill_null(superseded, False))
    return table.filter(pc.invert(hidden))


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
