"""How long work takes here, judged by what it took before."""

import math

_WEIGHT_OF_THE_NEW = 0.3
"""A machine that became slower is believed after a few pieces."""
_BELIEVED_PIECES = 100
"""For so many pieces of other sizes a size is not tried again that was too slow."""


class Durations:
    """Seconds per unit of work, for each size of a piece: small pieces use a device worse."""

    def __init__(self) -> None:
        self._seconds_per_unit: dict[int, float] = {}
        self._pieces = 0
        self._learned_at: dict[int, int] = {}

    def learn(self, piece: float, units: float, seconds: float) -> None:
        """Enters what some pieces of this size took, `units` all together."""
        if seconds <= 0:  # too little for the clock
            return
        size, took = _size(piece), seconds / units
        self._pieces += 1
        self._learned_at[size] = self._pieces
        before = self._seconds_per_unit.get(size, took)
        self._seconds_per_unit[size] = before + _WEIGHT_OF_THE_NEW * (took - before)

    def expected(self, piece: float, units: float) -> float | None:
        """The seconds that pieces of this size will take. None where none so large were seen: a
        guess by smaller ones would be too long, and keep out what could be done."""
        known = [size for size in self._seconds_per_unit if size >= _size(piece)]
        return units * self._seconds_per_unit[min(known)] if known else None

    def units_within(self, seconds: float) -> float:
        """How many units one piece may have to take no longer, as far as this is known. What is
        larger than all that was seen is tried, and what was too slow again after a while: the
        machine may have been busy. 0 where nothing seen was as quick."""
        every = [(size, seconds / each) for size, each in self._seconds_per_unit.items()]
        known = [self._bounded(units, seconds) for size, units in every if _size(units) >= size]
        return max(known, default=0.0)

    def _bounded(self, units: float, seconds: float) -> float:
        """So many, or fewer where pieces of that size were too slow of late."""
        while self._is_too_slow(units, seconds):
            units = math.nextafter(2.0 ** (_size(units) - 1), 0.0)
        return units

    def _is_too_slow(self, units: float, seconds: float) -> bool:
        size = _size(units)
        each = self._seconds_per_unit.get(size, 0.0)
        # Its own rounding must not count against a size.
        is_slow = units * each > seconds * (1 + 1e-9)
        return is_slow and self._pieces - self._learned_at[size] < _BELIEVED_PIECES


def _size(piece: float) -> int:
    """The same for pieces up to twice as large."""
    return math.frexp(piece)[1]
