"""Which place each 32-byte key has, for more keys than the memory holds.

Up to 2^22 entries lie in memory. More are partitioned by the keys' first byte in the temporary
folder, each partition is sorted by itself, and a look-up reads what it needs of the result: the
memory stays that of one partition. The files have no names, so nothing is left of a killed process.
"""

import mmap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.temporary import room, temporary_file

KEY = np.dtype("S32")
ENTRY = np.dtype([("key", KEY), ("time", np.int64), ("place", np.int64)])

IN_MEMORY = 1 << 22  # entries; the sort of so many takes 0.6 GB

_PARTITIONS = 256
_STORED = np.dtype([("key", KEY), ("place", np.int64)])  # one page of memory a look-up, not two
_READ_AT_ONCE = 1 << 16
# A look-up may map 16 pages around each that it touches: 64 KB, and 0.1 GB for so many.
_FOUND_AT_ONCE = 1 << 11

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
        self._mapped: mmap.mmap | None = None
        self._num_bytes = 2
        with ExitStack() as files:
            waiting: list[Entries] = [np.empty(0, ENTRY)]
            partitions: _Partitions | None = None
            for piece in pieces:
                waiting.append(piece)
                if sum(map(len, waiting)) >= IN_MEMORY:
                    partitions = partitions or _Partitions(files.enter_context(temporary_file()))
                    partitions.add(np.concatenate(waiting))
                    waiting = [np.empty(0, ENTRY)]
            if partitions is None:
                stored = _settled(np.concatenate(waiting))
                starts = _starts(stored["key"], self._num_bytes)
            else:
                partitions.add(np.concatenate(waiting))
                self._num_bytes = 3
                self._mapped, starts = _sorted_file(partitions)
                stored = np.frombuffer(self._mapped, _STORED)
        self._keys: Keys = stored["key"]
        self._places: Integers = stored["place"]
        # Where the keys of each first two or three bytes start: a search in all of 10^7 waits for
        # memory 24 times, one in a bucket of 60 hardly ever.
        self._starts: Integers = starts

    def __len__(self) -> int:
        """Return the number of distinct keys."""
        return len(self._keys)

    def places(self) -> Iterator[Integers]:
        """Yield the places that count, those of superseded entries left out, in pieces."""
        for start in range(0, len(self), _READ_AT_ONCE):
            yield np.array(self._places[start : start + _READ_AT_ONCE])
            self._give_back()

    def find(self, keys: Keys) -> Integers:
        """Return the place of each key; -1: not there."""
        if self._mapped is None:
            return self._find(keys)
        pieces = [np.empty(0, np.int64)]
        for start in range(0, len(keys), _FOUND_AT_ONCE):
            pieces.append(self._find(keys[start : start + _FOUND_AT_ONCE]))
            self._give_back()
        return np.concatenate(pieces)

    def _find(self, keys: Keys) -> Integers:
        if not len(self._keys):
            return np.full(len(keys), -1, dtype=np.int64)
        bucket = _leading(keys, self._num_bytes)
        low, high = self._starts[bucket], self._starts[bucket + 1]
        while (low < high).any():
            middle = (low + high) // 2
            # Where low == high, middle may be one behind the end, and nothing changes.
            below = (low < high) & (self._keys[middle.clip(max=len(self._keys) - 1)] < keys)
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        nearest = low.clip(max=len(self._keys) - 1)
        return np.where(self._keys[nearest] == keys, self._places[nearest], -1)

    def _give_back(self) -> None:
        """Let go of the pages that were read: the system keeps them only while it has room."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)


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


def _sorted_file(partitions: _Partitions) -> tuple[mmap.mmap, Integers]:
    """Return what counts of all partitions as a sorted file, and where the buckets start in it."""
    starts = np.zeros((1 << 24) + 1, np.int64)
    behind = starts[1:].reshape(_PARTITIONS, 1 << 16)
    total = 0
    with temporary_file() as file:
        for partition, found in enumerate(partitions):
            stored = _settled(found)
            _append(file, stored)
            # The first byte is the same in all, the next two say which bucket.
            behind[partition] = total + _starts(stored["key"], 3, offset=partition << 16)[1:]
            total += len(stored)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped, starts


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
