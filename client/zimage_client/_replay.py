"""Whether a request that failed is sent again, and when: the only retry machine for streams.

Generate is a pure function of its request, so sending it again is safe. It is done where another
try can help: the transport broke, or the service says that it soon will be there.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from zimage_core.errors import Overloaded, Unavailable, ZImageError

_ENCODER_AWAY = "ENCODER_UNAVAILABLE"
_PATIENCE_SECONDS = {
    "LOADING": 600.0,  # large weights on a slow disk
    "DEVICE_LOST": 600.0,  # the same, once more
    "DRAINING": 60.0,  # another replica, or this one's successor
    "QUEUE_FULL": 60.0,
    _ENCODER_AWAY: 60.0,
}
_LONGEST_PATIENCE_SECONDS = max(_PATIENCE_SECONDS.values())
_SHORT_PATIENCE_SECONDS = 10.0  # nobody there: more often a wrong address than a restart
_MOST_BREAKS = 5  # after being accepted: a request that kills its server must not go on for ever
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass
class _Silence:
    """Failures in a row, no work between them."""

    began: float
    reason: str = ""
    reason_began: float = 0.0
    failures: int = 0


class Replay:
    """The tries of one request."""

    def __init__(
        self,
        *,
        timeout: float | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._enabled = enabled
        self._deadline = None if timeout is None else clock() + timeout
        self._silence: _Silence | None = None
        self._was_taken = False
        self._breaks = 0

    def within(self, limit: float | None) -> float | None:
        """The shorter of a call's own limit in seconds and what is left of the timeout."""
        if self._deadline is None:
            return limit
        left = max(0.0, self._deadline - self._clock())
        return left if limit is None else min(limit, left)

    def taken(self) -> None:
        """The server took the request: if it breaks now, that may be the request's own fault."""
        self._was_taken = True

    def worked(self) -> None:
        """The server works on it: what failed before is forgotten."""
        self._silence = None

    def pause_after(self, error: ZImageError) -> float:
        """Seconds until the next try; raises the error when there shall be none."""
        if not self._enabled or not _may_pass(error):
            raise error
        self._breaks += self._was_taken and error.reason != _ENCODER_AWAY
        self._was_taken = False
        now = self._clock()
        silence = self._silence = self._silence or _Silence(began=now)
        if error.reason != silence.reason:
            silence.reason, silence.reason_began = error.reason, now
        pause = _pause(silence.failures) if error.retry_after is None else error.retry_after
        silence.failures += 1
        patience = _PATIENCE_SECONDS.get(error.reason, _SHORT_PATIENCE_SECONDS)
        too_late = min(
            silence.reason_began + patience,
            silence.began + _LONGEST_PATIENCE_SECONDS,
            float("inf") if self._deadline is None else self._deadline,
        )
        if self._breaks > _MOST_BREAKS or now + pause >= too_late:
            raise error
        return pause


def _pause(failures: int) -> float:
    longest = min(_FIRST_PAUSE_SECONDS * 2.0**failures, _LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - so that callers do not come in step


def _may_pass(error: ZImageError) -> bool:
    """A full queue empties when its server says so; too little memory does not."""
    if isinstance(error, Overloaded):
        return error.reason == "QUEUE_FULL" and error.retry_after is not None
    return isinstance(error, Unavailable)
