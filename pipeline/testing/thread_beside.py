"""A thread that works beside a block of code, until the block ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def thread_beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread; it is given an event that is set when the block ends, and awaited."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
