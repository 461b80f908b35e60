"""What the device did of late, and for whom."""

import math
import time
from collections import deque

from dit_service.messages import Part, Recalled, Span
from zimage_core.serving import memory
from zimage_core.wire import request_id

_KEPT_PARTS = 1 << 14
"""A few minutes of fast steps, in a few megabytes."""


class Diary:
    """Remembers pieces of work, and forgets the oldest."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()
        self._part_count = 0

    def recalled(self, last_seconds: float | None) -> Recalled:
        """What ended within the last seconds; None for all that is remembered."""
        now = time.monotonic()
        since = -math.inf if last_seconds is None else now - last_seconds
        spans = (span for span in self._spans if span.began + span.seconds >= since)
        return Recalled(tuple(spans), now, *memory.used_and_peak())

    def enter(self, work: str, seconds: float, *parts: Part) -> None:
        """A piece of work that is done now; not if nobody asked for it, as at warm-up."""
        if not any(part.request_id for part in parts):
            return
        self._spans.append(Span(work, time.monotonic() - seconds, seconds, parts))
        self._part_count += len(parts)
        while self._part_count > _KEPT_PARTS:
            self._part_count -= len(self._spans.popleft().parts)


def part(image_index: int = 0, step: int = 0) -> Part:
    """Where the request at hand is."""
    return Part(request_id.current.get(), image_index, step)
