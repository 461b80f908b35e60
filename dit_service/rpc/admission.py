"""Who may come in: a bounded number of requests, each with a place from its arrival on."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from zimage_core.errors import Overloaded

_RETRY_AFTER_SECONDS = 2.0


class Admission:
    """Counts the requests in the house: one that runs, and those that wait."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._arrivals = itertools.count()
        self._inside: set[int] = set()

    @contextmanager
    def place(self) -> Iterator[int]:
        """A place until the block ends, with the number of requests before it; or Overloaded."""
        if len(self._inside) > self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} requests are waiting already; try again later or elsewhere",
                reason="QUEUE_FULL",
                fields={"given": str(len(self._inside)), "allowed": str(self._max_waiting)},
                retry_after=_RETRY_AFTER_SECONDS,
            )
        arrival = next(self._arrivals)
        before = len(self._inside)
        self._inside.add(arrival)
        try:
            yield before
        finally:
            self._inside.discard(arrival)
