"""Check the answers and the token cache of an output: `python jobs/verify.py output=s3://...`."""

import logging
import sys
from itertools import chain

from pipeline.cli import load
from pipeline.config import VerifyConfig
from pipeline.errors import StartupError
from pipeline.storage import Storage, StorageError
from pipeline.token_cache import find_folders
from pipeline.verify import verify_cache, verify_output


def main() -> int:
    """Print a line for each fault; return 1 when there are any, 2 when it cannot be checked."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    config = load(VerifyConfig, sys.argv[1:])
    storage = Storage(config.storage)
    faults = 0
    try:
        folders = find_folders(storage, config.cache_root)
        found = (verify_cache(storage, folder) for folder in folders)
        for fault in chain(verify_output(storage, config.output), *found):
            faults += 1
            print(f"fault: {fault}")
    except (StartupError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{faults} faults in the answers and in {len(folders)} caches")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
