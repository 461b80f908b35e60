"""What a front and its worker process say to each other in every service: plain data, pickled, over
a pair of sockets that nobody else can reach."""

import asyncio
import pickle
import struct
from dataclasses import dataclass
from typing import BinaryIO

from zimage_core.errors import ZImageError

_LENGTH = struct.Struct("<Q")


def packed(message: object) -> bytes:
    """A message behind its length."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> object | None:
    """The front's next message from its worker; None when the worker is gone."""
    try:
        [length] = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        body = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None
    return _unpacked(body)


def read(stream: BinaryIO) -> object | None:
    """The worker's next message from its front; None when the front is gone."""
    try:
        header = stream.read(_LENGTH.size)
        [length] = _LENGTH.unpack(header) if len(header) == _LENGTH.size else [0]
        body = stream.read(length)
    except OSError:
        return None
    return _unpacked(body) if body and len(body) == length else None


def _unpacked(body: bytes) -> object:
    message: object = pickle.loads(body)  # noqa: S301 - from our own child or parent
    return message


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

    memory: dict[str, int]
    """What the process holds, in bytes."""
