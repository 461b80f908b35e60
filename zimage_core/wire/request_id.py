"""The id of the request at hand: one for all hops of a request, on every log line."""

import uuid
from contextvars import ContextVar

KEY = "x-request-id"
"""The metadata key that carries it."""

current: ContextVar[str] = ContextVar("request_id", default="")

_LONGEST = 128


def fresh() -> str:
    """A new id."""
    return uuid.uuid4().hex


def accept(given: str) -> str:
    """The caller's id where it is fit for a log line, else a new one."""
    fit = 0 < len(given) <= _LONGEST and given.isascii() and given.isprintable()
    return given if fit else fresh()
