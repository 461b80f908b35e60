"""How fast this device is at one kind of work: what the watchdog expects of the next piece."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Announce = Callable[[str, float], None]
"""Tells whoever watches that work of this name begins, with the seconds expected of it."""


@dataclass(slots=True)
class Taken:
    """How long a piece of work took, once it is done."""

    seconds: float = 0.0


class Pace:
    """Seconds per unit of work: a guess at first, then the slowest seen."""

    def __init__(self, what: str, guess: float, announce: Announce) -> None:
        self._what = what
        self._guess = guess
        self._slowest = 0.0
        self._announce = announce

    @contextmanager
    def working(self, units: float) -> Iterator[Taken]:
        """Announces a piece of work and learns from how long it took."""
        self._announce(self._what, units * (self._slowest or self._guess))
        taken, began = Taken(), time.monotonic()
        yield taken
        taken.seconds = time.monotonic() - began
        self._slowest = max(self._slowest, taken.seconds / units)
