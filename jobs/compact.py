"""Merge small files and drop what nobody sees any more: `python jobs/compact.py output=s3://...`."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

from pipeline.cli import load
from pipeline.compact_answers import compact_answers
from pipeline.compact_cache import Compaction, compact_cache
from pipeline.config import CompactConfig
from pipeline.errors import StartupError
from pipeline.lease import hold
from pipeline.storage import Storage, StorageError
from pipeline.token_cache import find_folders


def describe(what: str, done: Compaction) -> str:
    """Return one line about what was done."""
    return (
        f"{what}: {done.merged} files merged into {done.written}; {done.deleted} replaced files "
        f"deleted, {done.waiting} wait for the end of grace_s"
    )


def main() -> int:
    """Compact answers and cache; return 1 when damaged rows were found, 2 when it could not."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    config = load(CompactConfig, sys.argv[1:])
    storage = Storage(config.storage)
    sizes: dict[str, Any] = {
        "target_bytes": config.target_bytes,
        "grace_s": config.grace_s,
        "now": datetime.now(UTC),
    }
    damaged: list[str] = []
    try:
        with hold(
            storage, config.output, "jobs/compact.py", expiry_s=config.lease.expiry_s, say=print
        ) as lease:
            done = compact_answers(
                storage, config.output, drop_unreadable=config.drop_unreadable, **sizes
            )
            print(describe("answers", done))
            damaged += done.damaged
            for folder in find_folders(storage, config.cache_root):
                lease.check()
                done = compact_cache(storage, folder, **sizes)
                print(describe(f"cache {folder.rpartition('/')[2][:12]}", done))
                damaged += done.damaged
    except (StartupError, StorageError) as error:
        print(f"error: {error}; what was done so far holds, run it again", file=sys.stderr)
        return 2
    for message in damaged:
        print(f"damaged: {message}")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
