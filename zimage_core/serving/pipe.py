"""What a front and its worker process say to each other in every service: plain data, pickled."""

from dataclasses import dataclass

from zimage_core.errors import ZImageError


@dataclass(frozen=True, slots=True)
class Submit:
    """Front to worker: a new call; the payload is one of the service's messages."""

    call: int
    payload: object
    request_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Front to worker: nobody waits for this call any more."""

    call: int


@dataclass(frozen=True, slots=True)
class Event:
    """Worker to front: something of a call."""

    call: int
    payload: object


@dataclass(frozen=True, slots=True)
class Finished:
    """Worker to front: the last of a call, with its error if it failed."""

    call: int
    error: ZImageError | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to front: loaded and warm; the payload describes what was loaded."""

    description: object


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Worker to front: loading again would fail again."""

    error: ZImageError


@dataclass(frozen=True, slots=True)
class Working:
    """Worker to front: a piece of work begins; it is hung if it takes many times as long."""

    what: str
    expected_seconds: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Worker to front: the piece of work ended."""


@dataclass(frozen=True, slots=True)
class Alive:
    """Worker to front: a sign of life, sent by a thread of its own."""
