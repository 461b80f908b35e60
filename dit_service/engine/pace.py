"""How fast this device is at one kind of work: what the watchdog expects of the next piece."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Announce = Callable[[str, float], None]
"""Tells whoever watches that work of this name begins, with the seconds expected of it."""


_FORGETTING = 0.98
"""A first piece of work chooses kernels and takes memory: it is no measure for ever."""


class Pace:
    """Seconds per unit of work: a guess at first, then the slowest of late."""

    def __init__(self, what: str, guess: float, announce: Announce) -> None:
        self._what = what
        self._guess = guess
        self._slowest = 0.0
        self._announce = announce

    def begin(self, units: float) -> "Piece":
        """Announces a piece of work."""
        piece = Piece(self, units)
        piece.announce()
        return piece

    @contextmanager
    def working(self, units: float) -> Iterator["Piece"]:
        """The same for work that is done when the block is."""
        piece = self.begin(units)
        yield piece
        piece.done()

    def announce(self, units: float) -> None:
        """Says what is expected of a piece."""
        self._announce(self._what, units * (self._slowest or self._guess))

    def learn(self, seconds_per_unit: float) -> None:
        """Enters what a piece took."""
        self._slowest = max(_FORGETTING * self._slowest, seconds_per_unit)


class Piece:
    """A piece of work under way."""

    def __init__(self, pace: Pace, units: float) -> None:
        self._pace = pace
        self._units = units
        self._began = time.monotonic()
        self.seconds = 0.0
        """How long it took, once it is done."""

    def announce(self) -> None:
        """Says that it begins, or is under way still."""
        self._pace.announce(self._units)

    def done(self) -> None:
        """Learns from how long it took."""
        self.seconds = time.monotonic() - self._began
        self._pace.learn(self.seconds / self._units)
