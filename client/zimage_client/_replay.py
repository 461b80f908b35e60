"""Whether a request that failed is sent again, and when: the only retry machine for streams.

Generate is a pure function of its request, so sending it again is safe. It is done where another
try can help: the transport broke, or the service says that it soon will be there.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from zimage_core.errors import DeadlineTooShort, Overloaded, Unavailable, ZImageError

_PATIENCE_SECONDS = {
    "LOADING": 600.0,  # large weights on a slow disk
    "DEVICE_LOST": 600.0,  # the same, once more
    "QUEUE_FULL": 60.0,
    "RATE_LIMITED": 60.0,
    "ENCODER_UNAVAILABLE": 60.0,
    "BLOB_BUSY": 60.0,  # a dead connection is noticed after 15 s
    "STORE_UNAVAILABLE": 60.0,
    "STOPPING": 60.0,
}
_LONGEST_PATIENCE_SECONDS = max(_PATIENCE_SECONDS.values())
_SHORT_PATIENCE_SECONDS = 10.0  # nobody there: more often a wrong address than a restart
_RESTART_PATIENCE_SECONDS = 60.0  # nobody there any more: a restart
_MOST_BREAKS = 5  # while worked on: a request that kills its server must not go on for ever
_UNREACHABLE = "UNREACHABLE"
_ITS_OWN = (
    "UNKNOWN_FIELD",
    "UNIMPLEMENTED",
    "DEADLINE_UNREACHABLE",
    "TLS_EXPIRED",
    "TLS_UNTRUSTED",
    "TLS_WRONG_NAME",
    "TLS_NOT_SPOKEN",
)
"""What may be true of one replica alone: it is older, busier or set up wrongly."""
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass
class _Silence:
    """Failures in a row, no work between them."""

    began: float
    reason: str = ""
    reason_began: float = 0.0
    failures: int = 0
    last: ZImageError | None = None
    last_at: int = 0
    """How far the try had come that ended with it."""


class Replay:
    """The tries of one request."""

    def __init__(
        self,
        *,
        timeout: float | None = None,
        enabled: bool = True,
        others: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`others` are the replicas that may be tried at once when one fails."""
        self._clock = clock
        self._began = clock()
        self._tries = 0
        self._enabled = enabled
        self._others = self._untried = others
        self._deadline = None if timeout is None else clock() + timeout
        self._silence: _Silence | None = None
        self._was_met = False
        self._was_worked_on = False
        self._breaks = 0
        self._came_to = 0

    def within(self, limit: float | None) -> float | None:
        """The shorter of a call's own limit in seconds and what is left of the timeout."""
        if self._deadline is None:
            return limit
        left = max(0.0, self._deadline - self._clock())
        return left if limit is None else min(limit, left)

    def taken(self) -> None:
        """The server took the request; if it breaks in the queue, another one did that."""
        self._was_met = True
        self._was_worked_on = False
        self._came_to = 1

    def encoded(self) -> None:
        """The server has the embeddings, whatever its encoder said before."""
        self._came_to = 2

    def worked(self) -> None:
        """The server works on it: what failed before is forgotten, a break may be its own fault."""
        self._was_worked_on = True
        self._silence = None

    def advanced(self) -> None:
        """More is done than ever before: what breaks on the way did not prevent it."""
        self._silence = None
        self._breaks = 0

    def pause_after(self, error: ZImageError) -> float:
        """Seconds until the next try; raises the error when there shall be none. A timeout that
        passes where the try before failed is told as that failure."""
        if isinstance(error, DeadlineTooShort) and (obstacle := self._obstacle()):
            obstacle.add_note("the timeout passed while it was tried again")
            raise obstacle from error
        self._tries += 1
        if not self._enabled or not (_may_pass(error) or self._is_its_own(error)):
            raise error
        self._breaks += self._was_worked_on
        self._was_worked_on = False
        self._was_met |= error.reason != _UNREACHABLE
        now = self._clock()
        silence = self._silence = self._silence or _Silence(began=now)
        if error.reason != silence.reason:
            silence.reason, silence.reason_began = error.reason, now
        if self._untried:
            self._untried -= 1
            pause = 0.0
        else:
            self._untried = self._others
            pause = _pause(silence.failures) if error.retry_after is None else error.retry_after
            silence.failures += 1
        silence.last, silence.last_at, self._came_to = error, self._came_to, 0
        too_late = min(
            silence.reason_began + self._patience(error.reason),
            silence.began + _LONGEST_PATIENCE_SECONDS,
            float("inf") if self._deadline is None else self._deadline,
        )
        if self._breaks > _MOST_BREAKS or now + pause >= too_late:
            if self._tries > 1:
                error.add_note(f"tried {self._tries} times in {now - self._began:.1f} s")
            raise error
        return pause

    def _is_its_own(self, error: ZImageError) -> bool:
        """Whether another replica is worth a try."""
        return error.reason in _ITS_OWN and self._untried > 0

    def _obstacle(self) -> ZImageError | None:
        """What ended the last try, unless this one has come further."""
        silence = self._silence
        return silence.last if silence and self._came_to <= silence.last_at else None

    def _patience(self, reason: str) -> float:
        if reason == _UNREACHABLE and self._was_met:
            return _RESTART_PATIENCE_SECONDS
        return _PATIENCE_SECONDS.get(reason, _SHORT_PATIENCE_SECONDS)


def _pause(failures: int) -> float:
    longest = min(_FIRST_PAUSE_SECONDS * 2.0**failures, _LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - so that callers do not come in step


def _may_pass(error: ZImageError) -> bool:
    """A full queue empties when its server says so; too little memory does not."""
    if isinstance(error, Overloaded):
        return error.reason in ("QUEUE_FULL", "RATE_LIMITED") and error.retry_after is not None
    return isinstance(error, Unavailable)
