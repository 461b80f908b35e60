"""Who takes part in the next step when not all can, or not all should."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from zimage_core.planning.shares import Share

T = TypeVar("T")

_ROUNDING = 1e-6
_TURNS_OF_THE_OLDEST = 4
"""In one of so many steps of its line the oldest comes first, and stays so until it had its turn: a
stream of short ones delays it, no more."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a step asks of the device: its time, in operations, and its memory, in bytes."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """Somebody who waits for a step."""

    one: T
    share: Share
    arrival: int
    """Lower for those who came earlier; each has its own."""
    load: Load
    """Of the next step."""
    flops_left: float
    """Of that step and all that follow."""
    is_solo: bool
    """Whether it steps with nobody."""


class _Line(Generic[T]):
    """Those of one share."""

    def __init__(self, weight: float, served: float) -> None:
        self.weight = weight
        self.waiting: list[Waiting[T]] = []
        self.served = served
        """The operations of those who took part so far, by the weight: how far this line is."""
        self._turns = 0
        """Steps of this line since its oldest took part."""

    def arrange(self) -> None:
        """Whoever has least left comes first: so most are done early, and equals in the order they
        came. The oldest has turns of its own."""
        self.waiting.sort(key=lambda one: (one.flops_left, one.arrival))
        if self._turns >= _TURNS_OF_THE_OLDEST - 1:
            oldest = self.oldest
            self.waiting.sort(key=lambda one: one.arrival != oldest)

    def count(self, oldest: int) -> None:
        """Enters a step in which some of this line took part; `oldest` came first of the line."""
        is_left_out = any(one.arrival == oldest for one in self.waiting)
        self._turns = self._turns + 1 if is_left_out else 0

    @property
    def oldest(self) -> int:
        """The arrival of whoever has been here longest."""
        return min(one.arrival for one in self.waiting)

    @property
    def first_served(self) -> float:
        """How far it is when its first has taken part."""
        return self.served + self.waiting[0].load.flops / self.weight

    @property
    def all_served(self) -> float:
        """How far it is when all of them have."""
        return self.served + sum(one.load.flops for one in self.waiting) / self.weight


class Lines(Generic[T]):
    """A line for each share, which all advance by their weights: weighted fair queueing, counted in
    operations. With a single line everybody takes part, as far as there is room."""

    def __init__(self) -> None:
        self._lines: dict[Share, _Line[T]] = {}

    def __bool__(self) -> bool:
        return any(line.waiting for line in self._lines.values())

    def join(self, waiting: Waiting[T]) -> None:
        """A new line begins where the last of the others is: it has nothing to make up for."""
        share = waiting.share
        if share not in self._lines:
            served = min((line.served for line in self._lines.values()), default=0.0)
            self._lines[share] = _Line(share.weight, served)
        self._lines[share].waiting.append(waiting)

    def drop(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Takes those out for whom nobody waits."""
        dropped: list[T] = []
        for line in self._lines.values():
            wanted: list[Waiting[T]] = []
            for waiting in line.waiting:
                if is_unwanted(waiting.one):
                    dropped.append(waiting.one)
                else:
                    wanted.append(waiting)
            line.waiting = wanted
        return dropped

    def take(self, room: Load) -> list[T]:
        """Those of the next step: of each line as much as brings all to the same point, the nearest
        at which a line is through or the step is full. Somebody takes part, whatever the room."""
        self._lines = {share: line for share, line in self._lines.items() if line.waiting}
        self._count_from_the_last()
        lines = sorted(self._lines.values(), key=lambda line: line.served)
        if not lines:
            return []
        for line in lines:
            line.arrange()
        through = min(line.all_served for line in lines)
        full = lines[0].served + room.flops / sum(line.weight for line in lines)
        somebody = min(line.first_served for line in lines)
        goal = max(min(through, full), somebody) * (1 + _ROUNDING)
        taken = _Step[T](room)
        for line in lines:
            oldest, before = line.oldest, len(line.waiting)
            while line.waiting and line.first_served <= goal and taken.fits(line.waiting[0]):
                line.served = line.first_served
                taken.add(line.waiting.pop(0))
            # A line whose first did not fit is behind now, and comes first the next time.
            if len(line.waiting) < before:
                line.count(oldest)
        return taken.members

    def _count_from_the_last(self) -> None:
        """Only how far lines are from each other matters; large numbers would round that away."""
        last = min((line.served for line in self._lines.values()), default=0.0)
        for line in self._lines.values():
            line.served -= last


class _Step(Generic[T]):
    """Who takes part, and the room that is left beside them."""

    def __init__(self, room: Load) -> None:
        self.members: list[T] = []
        self._flops, self._bytes = room.flops, room.bytes
        self._is_solo = False

    def fits(self, waiting: Waiting[T]) -> bool:
        """Whether one more may come; the first may always."""
        if not self.members:
            return True
        if self._is_solo or waiting.is_solo:
            return False
        return waiting.load.flops <= self._flops and waiting.load.bytes <= self._bytes

    def add(self, waiting: Waiting[T]) -> None:
        """Takes one more in."""
        self.members.append(waiting.one)
        self._flops -= waiting.load.flops
        self._bytes -= waiting.load.bytes
        self._is_solo = waiting.is_solo
