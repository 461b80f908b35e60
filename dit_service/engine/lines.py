"""Who takes part in the next step when not all can, or not all should."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from zimage_core.planning.shares import Share

T = TypeVar("T")

_ROUNDING = 1e-6


class _Line(Generic[T]):
    """Those of one share. Whoever waited longest stands first."""

    def __init__(self, weight: int, served: float) -> None:
        self.weight = weight
        self.waiting: deque[tuple[T, int]] = deque()
        self.served = served
        """The tokens that took part so far, divided by the weight: how far this line is."""

    @property
    def first_served(self) -> float:
        """How far it is when its first has taken part."""
        return self.served + self.waiting[0][1] / self.weight

    @property
    def all_served(self) -> float:
        """How far it is when all of them have."""
        return self.served + sum(tokens for _, tokens in self.waiting) / self.weight


class Lines(Generic[T]):
    """A line for each share, which all advance by their weights: weighted fair queueing, counted in
    tokens. With a single line everybody takes part, as far as there is room."""

    def __init__(self, room: int) -> None:
        """`room` is the number of tokens that fit into a step; one alone may have more."""
        self._room = room
        self._lines: dict[Share, _Line[T]] = {}

    def __bool__(self) -> bool:
        return any(line.waiting for line in self._lines.values())

    def join(self, one: T, share: Share, tokens: int) -> None:
        """Stands at the end of its line. A new line begins where the last of the others is: it has
        nothing to make up for."""
        if share not in self._lines:
            served = min((line.served for line in self._lines.values()), default=0.0)
            self._lines[share] = _Line(share.weight, served)
        self._lines[share].waiting.append((one, tokens))

    def drop(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Takes those out for whom nobody waits."""
        dropped: list[T] = []
        for line in self._lines.values():
            wanted: deque[tuple[T, int]] = deque()
            for one, tokens in line.waiting:
                if is_unwanted(one):
                    dropped.append(one)
                else:
                    wanted.append((one, tokens))
            line.waiting = wanted
        return dropped

    def take(self, is_solo: Callable[[T], bool]) -> list[T]:
        """Those of the next step: of each line as much as brings all to the same point, the nearest
        at which a line is through or the step is full. Whoever is solo takes part alone."""
        self._lines = {share: line for share, line in self._lines.items() if line.waiting}
        lines = sorted(self._lines.values(), key=lambda line: line.served)
        if not lines:
            return []
        through = min(line.all_served for line in lines)
        full = lines[0].served + self._room / sum(line.weight for line in lines)
        somebody = min(line.first_served for line in lines)
        goal = max(min(through, full), somebody) * (1 + _ROUNDING)
        taken: list[T] = []
        room = self._room
        for line in lines:
            while line.waiting and line.first_served <= goal:
                one, tokens = line.waiting[0]
                if taken and (tokens > room or is_solo(one)):
                    break  # the line is behind now, and comes first the next time
                line.served = line.first_served
                line.waiting.popleft()
                room -= tokens
                taken.append(one)
                if is_solo(one):
                    return taken
        return taken
