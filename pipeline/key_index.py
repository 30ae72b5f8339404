"""Which place each 32-byte key has, for more keys than the memory holds.

Up to 2^22 entries are sorted in memory. More are partitioned by the keys' first byte in the
temporary folder, and sorted one partition after the other, so that no more memory is needed than
for the largest. What that leaves is held in memory up to 12 million keys (0.5 GB); beyond, a
look-up reads some bytes of a file. The files have no names: a killed process leaves nothing.
"""

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.temporary import room, temporary_file

KEY = np.dtype("S32")
ENTRY = np.dtype([("key", KEY), ("time", np.int64), ("place", np.int64)])

IN_MEMORY = 1 << 22  # entries; the sort of so many takes 0.6 GB, three times as many sorted 0.5 GB

_PARTITIONS = 256
_STORED = np.dtype([("key", KEY), ("place", np.int64)])
_AT_ONCE = 1 << 16

Keys = npt.NDArray[np.bytes_]
Integers = npt.NDArray[np.int64]
Entries = npt.NDArray[np.void]


def from_hex(keys: list[str]) -> Keys:
    """Return sha256 keys of 64 hex digits as an array of 32-byte keys.

    Raises ValueError for anything that is not 64 hex digits.
    """
    if any(len(key) != 64 for key in keys):
        raise ValueError("a key must have 64 hex digits")
    data = bytes.fromhex("".join(keys))
    if len(data) != 32 * len(keys):  # fromhex skips spaces
        raise ValueError("a key must have 64 hex digits")
    return np.frombuffer(data, KEY)


def entries(keys: Keys, places: Integers, times: Integers | int = 0) -> Entries:
    """Return what KeyIndex takes: keys, their places and how late each is."""
    made = np.empty(len(keys), ENTRY)
    made["key"], made["place"], made["time"] = keys, places, times
    return made


class KeyIndex:
    """Say which place a key has: of equal keys the latest counts, then the highest place."""

    def __init__(self, pieces: Iterable[Entries]) -> None:
        """Take the entries piece by piece, in any order.

        Raises StartupError when the temporary folder has no room for what the memory has none.
        """
        with ExitStack() as files:
            waiting: list[Entries] = [np.empty(0, ENTRY)]
            num_waiting = 0
            partitions: _Partitions | None = None
            for piece in pieces:
                waiting.append(piece)
                num_waiting += len(piece)
                if num_waiting >= IN_MEMORY:
                    partitions = partitions or _Partitions(files.enter_context(temporary_file()))
                    partitions.add(np.concatenate(waiting))
                    waiting, num_waiting = [np.empty(0, ENTRY)], 0
            last = np.concatenate(waiting)
            del waiting
            # Where the keys of each first two or three bytes start: a search in all of 10^7 waits
            # for memory 24 times, one in a bucket of 60 hardly ever.
            self._starts: Integers
            self._file: BinaryIO | None = None
            self._stored: npt.NDArray[np.void]
            if partitions is None:
                self._stored = _settled(last)
                self._starts = _starts(self._stored["key"], 2)
                return
            partitions.add(last)
            del last
            file = temporary_file()
            weakref.finalize(self, file.close)
            self._starts = _write_sorted(file, partitions)
        if len(self) <= 3 * IN_MEMORY:
            file.seek(0)
            self._stored = np.fromfile(file, _STORED)
            file.close()
        else:
            self._file = file

    def __len__(self) -> int:
        """Return the number of distinct keys."""
        return int(self._starts[-1])

    def places(self) -> Iterator[Integers]:
        """Yield the places that count, those of superseded entries left out, in pieces."""
        for start in range(0, len(self), _AT_ONCE):
            if self._file is None:
                yield self._stored["place"][start : start + _AT_ONCE]
            else:
                self._file.seek(start * _STORED.itemsize)
                yield np.fromfile(self._file, _STORED, _AT_ONCE)["place"]

    def find(self, keys: Keys) -> Integers:
        """Return the place of each key; -1: not there."""
        bucket = _leading(keys, 2 if len(self._starts) == (1 << 16) + 1 else 3)
        low, high = self._starts[bucket], self._starts[bucket + 1]
        if self._file is None:
            return _search(self._stored, keys, low, high)
        descriptor, width = self._file.fileno(), _STORED.itemsize
        ranges = zip((low * width).tolist(), ((high - low) * width).tolist(), strict=True)
        # 6 keys at 10^8, 60 at 10^9
        buckets = b"".join([os.pread(descriptor, length, start) for start, length in ranges])
        ends = np.cumsum(high - low)
        return _search(np.frombuffer(buckets, _STORED), keys, ends - (high - low), ends)


def _search(stored: npt.NDArray[np.void], keys: Keys, low: Integers, high: Integers) -> Integers:
    """Return the place of each key among those of `stored` from `low` to before `high`, or -1."""
    if not len(stored):
        return np.full(len(keys), -1, dtype=np.int64)
    last = len(stored) - 1
    stop = high
    while (low < high).any():
        middle = (low + high) // 2
        # Where low == high, middle may be one behind the end, and nothing changes.
        below = (low < high) & (stored["key"][middle.clip(max=last)] < keys)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    nearest = low.clip(max=last)
    found = (low < stop) & (stored["key"][nearest] == keys)
    return np.where(found, stored["place"][nearest], -1)


class _Partitions:
    """Entries by the first byte of their keys, in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lengths: list[Integers] = []  # of each partition, for each call of `add`

    def add(self, added: Entries) -> None:
        first = _leading(added["key"], 1)
        order = np.argsort(first.astype(np.uint8), kind="stable")
        _append(self._file, added[order])
        self._lengths.append(np.bincount(first, minlength=_PARTITIONS))

    def __iter__(self) -> Iterator[Entries]:
        lengths = np.array(self._lengths)
        starts = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)
        for partition in range(_PARTITIONS):
            pieces = []
            for start, length in zip(starts[:, partition], lengths[:, partition], strict=True):
                self._file.seek(int(start) * ENTRY.itemsize)
                pieces.append(np.fromfile(self._file, ENTRY, int(length)))
            yield np.concatenate(pieces)


def _write_sorted(file: BinaryIO, partitions: _Partitions) -> Integers:
    """Write what counts of all partitions, sorted; return where the buckets start in it."""
    starts = np.zeros((1 << 24) + 1, np.int64)
    behind = starts[1:].reshape(_PARTITIONS, 1 << 16)
    total = 0
    for partition, found in enumerate(partitions):
        stored = _settled(found)
        _append(file, stored)
        # The first byte is the same in all, the next two say which bucket.
        behind[partition] = total + _starts(stored["key"], 3, offset=partition << 16)[1:]
        total += len(stored)
    file.flush()
    return starts


def _settled(found: Entries) -> npt.NDArray[np.void]:
    """Return what counts of `found`, sorted by key."""
    order = np.lexsort((found["place"], found["time"]))
    keys: Keys = found["key"][order]
    by_key = np.argsort(keys, kind="stable")
    keys = keys[by_key]
    last = np.ones(len(keys), np.bool_)
    last[:-1] = keys[:-1] != keys[1:]
    stored = np.empty(int(last.sum()), _STORED)
    stored["key"], stored["place"] = keys[last], found["place"][order[by_key[last]]]
    return stored


def _starts(keys: Keys, num_bytes: int, *, offset: int = 0) -> Integers:
    """Return where the keys of each bucket start; the buckets are 2^16, `offset` the first."""
    lengths = np.bincount(_leading(keys, num_bytes) - offset, minlength=1 << 16)
    return np.concatenate([[0], np.cumsum(lengths)])


def _leading(keys: Keys, num_bytes: int) -> Integers:
    """Return the first bytes of each key as a number."""
    all_bytes = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), KEY.itemsize)
    number = np.zeros(len(keys), np.int64)
    for place in range(num_bytes):
        number = number << 8 | all_bytes[:, place]
    return number


def _append(file: BinaryIO, data: npt.NDArray[np.void]) -> None:
    with room():
        data.tofile(file)
