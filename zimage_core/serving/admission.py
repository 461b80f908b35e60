"""Who may come in: so many calls, so many seconds of work and so many bytes at once."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from zimage_core.errors import DeadlineTooShort, Overloaded
from zimage_core.planning.shares import COMMON, Share
from zimage_core.serving import metrics

_SOONEST_SECONDS = 1.0
_LATEST_SECONDS = 30.0
"""When a call that was turned away may look again; much can change in longer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be inside at once."""

    waiting: int
    """Calls, beside the one that runs."""
    seconds: float
    """That a newcomer is held up by others; its own work may take any."""
    bytes: int
    """That calls hold; one alone may hold any."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call will take."""

    seconds: float | None
    """Of the device; None where nobody knows yet."""
    bytes: int
    """That it holds until its caller has read the answer."""
    turns: int = 1
    """In how many pieces its work is done, so that others come in between."""
    share: Share = COMMON


class Place:
    """A call in the house, from its arrival on."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self.arrived = time.monotonic()
        self.cost = Cost(None, 0)
        self.left_to_do = 1.0

    def expect(self, cost: Cost, time_left: float | None = None) -> None:
        """Says what the call takes, before anything is done for it. Raises Overloaded when others
        hold so much that it cannot be taken in, DeadlineTooShort when it cannot be done in time."""
        self._admission.judge(self, cost, time_left)
        self.cost = cost

    def done(self, part: float) -> None:
        """Says how much of the work is behind it, from 0 to 1."""
        self.left_to_do = 1.0 - part

    def answered(self, held_bytes: int) -> None:
        """Gives the place up, like `leave`, with answers of so many bytes that are to be read."""
        self.cost = Cost(None, held_bytes)
        self.leave()

    @property
    def seconds(self) -> float:
        """Of the device, that its work still takes; 0 where nobody knows."""
        return (self.cost.seconds or 0.0) * self.left_to_do

    def seconds_in(self, turns: float) -> float:
        """Of its work, while somebody else has so many turns."""
        left = self.cost.turns * self.left_to_do
        return self.seconds * min(1.0, turns / left) if left else 0.0

    @property
    def calls_before(self) -> int:
        """That came before it and are not done."""
        return self._admission.calls_before(self)

    @property
    def expected_seconds(self) -> float | None:
        """Until its work is done, beside all others inside; None where nobody knows."""
        return self._admission.expected_seconds(self, self.cost)

    def leave(self) -> None:
        """Gives the place up: the work is done, and whoever reads slowly keeps nobody out. What it
        holds stays counted until the block ends."""
        self._admission.leave(self)


class Admission:
    """Those who are inside, and what they hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._working: list[Place] = []
        self._holding: set[Place] = set()
        self._left = asyncio.Event()
        self._line = asyncio.Lock()
        """Of those who wait for a turn."""
        metrics.QUEUE_CALLS.set_function(lambda: len(self._working))
        metrics.QUEUE_SECONDS.set_function(lambda: sum(place.seconds for place in self._working))
        metrics.QUEUE_BYTES.set_function(lambda: self._bytes)
        metrics.QUEUE_AGE.set_function(self._age)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place until the block ends; or Overloaded."""
        if self._is_full:
            raise self._full("calls", len(self._working) - 1, self._limits.waiting)
        place = self._come_in()
        try:
            yield place
        finally:
            self._go(place)

    @asynccontextmanager
    async def turn(self, held_bytes: int) -> AsyncIterator[Place]:
        """A place as soon as there is one: for items of streams, whose senders wait as well, in the
        order of their coming. They leave half of the places to those who do not wait."""
        async with self._line:
            while self._has_no_turn(held_bytes):
                self._left.clear()
                await self._left.wait()
            place = self._come_in()
        try:
            place.cost = Cost(None, held_bytes)
            yield place
        finally:
            self._go(place)

    def _come_in(self) -> Place:
        place = Place(self)
        self._working.append(place)
        self._holding.add(place)
        return place

    def _go(self, place: Place) -> None:
        place.leave()
        self._holding.discard(place)
        self._left.set()

    def _has_no_turn(self, held_bytes: int) -> bool:
        held = self._bytes
        return len(self._working) > self._limits.waiting // 2 or (
            held > 0 and held + held_bytes > self._limits.bytes // 2
        )

    def judge(self, place: Place, cost: Cost, time_left: float | None) -> None:
        """Raises what speaks against taking the call in."""
        expected = self.expected_seconds(place, cost)
        if expected is None:
            ahead = sum(other.seconds for other in self._working)
        else:
            ahead = expected - (cost.seconds or 0.0)
        held = self._bytes - place.cost.bytes
        if ahead > self._limits.seconds:
            raise self._full("seconds of work", ahead, self._limits.seconds)
        if held and held + cost.bytes > self._limits.bytes:
            raise self._full("bytes", held + cost.bytes, self._limits.bytes)
        if time_left is not None and time_left <= (expected or 0.0):
            raise DeadlineTooShort(
                f"the deadline is in {time_left:.1f} s, this takes about {expected or 0.0:.1f} s",
                reason="DEADLINE_UNREACHABLE",
                fields={"given": f"{time_left:.1f}", "expected_seconds": f"{expected or 0.0:.1f}"},
            )

    def expected_seconds(self, place: Place, cost: Cost) -> float | None:
        """All in one line take turns, one piece each, so that who has fewer is done before; lines
        share the time by their weights."""
        if cost.seconds is None:
            return None
        turns = cost.turns * place.left_to_do
        lines: defaultdict[Share, list[Place]] = defaultdict(list)
        for other in self._working:
            if other is not place:
                lines[other.cost.share].append(other)
        own = cost.seconds * place.left_to_do
        own += sum(other.seconds_in(turns) for other in lines.pop(cost.share, []))
        return own + sum(
            min(sum(other.seconds for other in line), own * share.weight / cost.share.weight)
            for share, line in lines.items()
        )

    def calls_before(self, place: Place) -> int:
        """How many came before it and are not done."""
        return self._working.index(place) if place in self._working else 0

    def leave(self, place: Place) -> None:
        """Takes the call out of those that wait and work."""
        if place in self._working:
            self._working.remove(place)
            self._left.set()

    @property
    def _is_full(self) -> bool:
        return len(self._working) > self._limits.waiting

    @property
    def _bytes(self) -> int:
        return sum(place.cost.bytes for place in self._holding)

    def _age(self) -> float:
        return time.monotonic() - self._working[0].arrived if self._working else 0.0

    def _full(self, what: str, given: float, allowed: float) -> Overloaded:
        """Refuses until the first of those inside is expected to be done."""
        ends = [place.expected_seconds for place in self._working]
        soonest = min((end for end in ends if end), default=_SOONEST_SECONDS)
        return Overloaded(
            f"the queue is full: {given:g} {what}, {allowed:g} may wait; try again later or "
            "elsewhere",
            reason="QUEUE_FULL",
            fields={"what": what, "given": f"{given:g}", "allowed": f"{allowed:g}"},
            retry_after=min(max(soonest, _SOONEST_SECONDS), _LATEST_SECONDS),
        )
