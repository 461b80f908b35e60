"""Who may come in: a bounded number of calls, each with a place from its arrival on."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from zimage_core.errors import Overloaded

_RETRY_AFTER_SECONDS = 1.0


class Admission:
    """Counts the calls in the house: one that runs, and those that wait."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._inside = 0
        self._left = asyncio.Event()

    @contextmanager
    def place(self) -> Iterator[int]:
        """A place until the block ends, with the number of calls before it; or Overloaded."""
        if self._inside > self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} calls are waiting already; try again later or elsewhere",
                reason="QUEUE_FULL",
                fields={"allowed": str(self._max_waiting)},
                retry_after=_RETRY_AFTER_SECONDS,
            )
        self._inside += 1
        try:
            yield self._inside - 1
        finally:
            self._inside -= 1
            self._left.set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A place as soon as there is one: for items of streams, whose senders wait as well."""
        while self._inside > self._max_waiting:
            self._left.clear()
            await self._left.wait()
        with self.place():
            yield
