"""Events as the text of the live line."""

import time
from collections.abc import Callable

from zimage_client import Accepted, Event, Progress, Waiting

_WORTH_TELLING_SECONDS = 2.0


class ProgressText:
    """Remembers what it takes to say how fast it goes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 1
        self._began: dict[int, tuple[int, float]] = {}

    def of(self, event: Event) -> str | None:
        """The line for an event; None when it changes nothing."""
        match event:
            case Waiting():
                self._began.clear()
                away = event.reason == "UNREACHABLE"
                trouble = "the service cannot be reached" if away else event.message
                return f"{trouble}; trying again in {event.seconds:.1f} s"
            case Accepted():
                self._count = event.count
                waiting = f", {event.queue_position} others under way"
                return "queued" + (waiting if event.queue_position else "") + _rest(event)
            case Progress(stage="denoising" | "decoding"):
                return self._picture(event) + self._work(event) + _rest(event)
            case Progress():
                return event.stage
        return None

    def _picture(self, event: Progress) -> str:
        return f"picture {event.index + 1} of {self._count}: " if self._count > 1 else ""

    def _work(self, event: Progress) -> str:
        if event.stage == "decoding":
            return "decoding"
        now = self._clock()
        first_step, began = self._began.setdefault(event.index, (event.step, now))
        done = event.step - first_step
        pace = f", {(now - began) / done:.2f} s/step" if done > 0 else ""
        return f"step {event.step}/{event.steps}{pace}"


def _rest(event: Accepted | Progress) -> str:
    """What is left, where somebody waits long enough to ask."""
    seconds = event.expected_seconds
    return f", about {seconds:.0f} s left" if seconds and seconds >= _WORTH_TELLING_SECONDS else ""
