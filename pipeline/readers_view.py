"""Which of the rows of all runs readers see: exactly one for each (video_key, prompt_id)."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# `status` of a row that says that its uri's object is gone. Of such a row readers see nothing.
DELETED = "deleted"


def seen_by_readers(table: pa.Table) -> pa.Table:
    """Keep of the rows of an output those that readers see: see answers.read_answers."""
    return _latest(_current(undeleted(table)))


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
    """Keep the rows whose key is the newest of their uri."""
    newest = newest_of_uri(table)
    key_of_uri = (
        newest.column("video_key")
        .combine_chunks()
        .take(pc.index_in(table.column("uri"), newest.column("uri")).combine_chunks())
    )
    return table.filter(pc.equal(table.column("video_key"), key_of_uri))


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
