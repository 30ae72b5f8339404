"""A token cache of many keys and no tokens: key files about part files without content.

With a key file no part file is opened, so it loads as a true one does, at 50 bytes of disk a key.
"""

from pathlib import Path

import numpy as np

from pipeline import cache_keys
from pipeline.key_index import Keys
from pipeline.storage import Storage

KEYS_A_PART = 256  # videos of 1 MB of tokens each in files of 256 MB


def write_empty_parts(
    storage: Storage, folder: Path, run_id: str, keys: Keys, *, first: int
) -> None:
    """Write one key file about `keys`, the first of which is number `first` of the cache."""
    files = []
    for start in range(0, len(keys), KEYS_A_PART):
        uri = folder / f"part-{run_id}-{first + start:032x}.parquet"
        uri.touch()
        part = keys[start : start + KEYS_A_PART]
        times = np.arange(start, start + len(part), dtype=np.int64)
        files.append((str(uri), (part, times)))
    cache_keys.write_keys(storage, str(folder), files)
