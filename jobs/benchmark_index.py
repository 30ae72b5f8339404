"""Measure the key index of a token cache: `python jobs/benchmark_index.py [--keys 100000 ...]`.

A cache as compaction leaves it, but for its part files' content, is made in a temporary folder (50
bytes of disk a key). Measured is a process of its own, which loads the index and looks every key
up. `--parts` also writes true part files (2.4 KB a key) and loads the index from their footers, as
before the first compaction.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline import cache_keys, key_index, rows, token_cache
from pipeline.config import StorageConfig
from pipeline.storage import Storage
from pipeline.testing.empty_parts import KEYS_A_PART, write_empty_parts
from pipeline.testing.own_process import in_own_process, peak_memory_gib
from pipeline.token_cache import CacheIndex

STORAGE = Storage(StorageConfig())
LOOKED_UP_AT_ONCE = 8192  # as the work list does
BLOCK = cache_keys.KEYS_A_FILE
RUN_ID = "20260101T000000Z-00000000"


def random_keys(count: int) -> Iterator[key_index.Keys]:
    """Yield that many keys in blocks of whole part files, always the same ones."""
    for start in range(0, count, BLOCK):
        data = np.random.default_rng(start).bytes(32 * min(BLOCK, count - start))
        yield np.frombuffer(data, key_index.KEY)


def in_hex(keys: key_index.Keys) -> list[str]:
    """Return keys as the columns hold them."""
    text = keys.tobytes().hex()
    return [text[start : start + 64] for start in range(0, len(text), 64)]


def make_compacted(folder: Path, count: int) -> None:
    """Write key files for `count` keys, and part files without content."""
    folder.mkdir()
    for block, keys in enumerate(random_keys(count)):
        write_empty_parts(STORAGE, folder, RUN_ID, keys, first=block * BLOCK)


def make_parts(folder: Path, count: int) -> None:
    """Write true part files, of videos with two tokens."""
    video = {
        "tokens": bytes(256),
        "token_dtype": "bfloat16",
        "token_shape": [2, 64],
        "positions": [[0, 1]] * 3,
        "modality": [0, 1],
        "next_position": 2,
        "kept_index": [0, 1],
    }
    keys = [key for block in random_keys(count) for key in in_hex(block)]
    for start in range(0, count, KEYS_A_PART):
        kept = [
            {**video, "video_key": key, "uri": f"s3://bucket/videos/{key[:16]}.mp4"}
            for key in keys[start : start + KEYS_A_PART]
        ]
        token_cache.write_part(STORAGE, str(folder), RUN_ID, rows.build(kept, rows.KEPT))


def measure(folder: Path, count: int, name: str) -> None:
    """Print a line of the table; to be called in a process of its own, for its memory."""
    start, cpu_start = time.perf_counter(), time.process_time()
    index = CacheIndex(STORAGE, str(folder))
    load_s = time.perf_counter() - start
    found = 0
    start = time.perf_counter()
    for block in random_keys(count):
        for begin in range(0, len(block), LOOKED_UP_AT_ONCE):
            asked = in_hex(block[begin : begin + LOOKED_UP_AT_ONCE])
            found += sum(place is not None for place in index.locate(asked))
    find_s = time.perf_counter() - start
    if found != count:
        raise RuntimeError(f"{found} of {count} keys were found")
    print(
        f"| {count:,} | {name} | {load_s:.1f} s | {find_s:.1f} s | {load_s + find_s:.1f} s | "
        f"{time.process_time() - cpu_start:.1f} s | "
        f"{peak_memory_gib():.2f} GiB |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--parts", type=int, nargs="+", default=[10**4, 10**5], metavar="KEYS")
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}\n")
    print("| keys | read from | load | look all up | together | of CPU | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for make, counts, name in (
        (make_parts, options.parts, "part files"),
        (make_compacted, options.keys, "key files"),
    ):
        for count in counts:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "cache"
                make(folder, count)
                in_own_process(measure, folder, count, name)


if __name__ == "__main__":
    main()
