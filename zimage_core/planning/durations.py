"""How long work takes here, judged by what it took before."""

import math

_WEIGHT_OF_THE_NEW = 0.3
"""A machine that became slower is believed after a few pieces."""


class Durations:
    """Seconds per unit of work, for each size of a piece: small pieces use a device worse."""

    def __init__(self) -> None:
        self._seconds_per_unit: dict[int, float] = {}

    def learn(self, piece: float, units: float, seconds: float) -> None:
        """Enters what some pieces of this size took, `units` all together."""
        size, took = _size(piece), seconds / units
        before = self._seconds_per_unit.get(size, took)
        self._seconds_per_unit[size] = before + _WEIGHT_OF_THE_NEW * (took - before)

    def expected(self, piece: float, units: float) -> float | None:
        """The seconds that pieces of this size will take. None where none so large were seen: a
        guess by smaller ones would be too long, and keep out what could be done."""
        known = [size for size in self._seconds_per_unit if size >= _size(piece)]
        return units * self._seconds_per_unit[min(known)] if known else None

    def units_within(self, seconds: float) -> float:
        """How many units one piece may have to take no longer, as far as this is known: more, where
        it is, is tried. 0 where nothing seen was as quick."""
        every = [(size, seconds / each) for size, each in self._seconds_per_unit.items()]
        return max((units for size, units in every if _size(units) >= size), default=0.0)


def _size(piece: float) -> int:
    """The same for pieces up to twice as large."""
    return math.frexp(piece)[1]
