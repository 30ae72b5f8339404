"""How many questions may be out at once: those that saw an engine die want fewer beside them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Company:
    """Let tasks of one event loop in, in the order in which they come."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside: list[float] = []
        self._left = asyncio.Event()

    @asynccontextmanager
    async def of(self, most: float) -> AsyncIterator[None]:
        """Be inside, with no more than `most` in all as long as it lasts."""
        async with self._door:  # kept while waiting: nobody who comes later is first
            while len(self._inside) >= min([most, *self._inside]):
                self._left.clear()
                await self._left.wait()
            self._inside.append(most)
        try:
            yield
        finally:
            self._inside.remove(most)
            self._left.set()
