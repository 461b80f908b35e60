"""Blobs to a service and back: in as many tries as it takes, each from where the last one ended."""

import asyncio
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import grpc.aio

from zimage_client import _calls
from zimage_client._channel import Metadata, Near, Way
from zimage_client._reading import malformed
from zimage_client._replay import Replay
from zimage_core.errors import InvalidRequest, ZImageError
from zimage_core.wire.limits import DIGESTS_PER_FIND
from zimage_rpc.blob.v1 import blob_pb2


class Transfers:
    """Of one client with one service."""

    def __init__(self, way: Way, metadata: Metadata) -> None:
        self._way = way
        self._metadata = metadata

    async def find(self, digests: Iterable[str], timeout: float | None) -> set[str]:
        """Those that are there."""
        asked = list(digests)
        found: set[str] = set()
        for first in range(0, len(asked), DIGESTS_PER_FIND):
            some = asked[first : first + DIGESTS_PER_FIND]
            found |= await self._way.first(
                lambda channel, some=some: _calls.find_blobs(  # type: ignore[misc]
                    channel, some, timeout, self._metadata
                )
            )
        return found

    async def put(self, file: Path, replay: Replay, near: Near | None = None) -> str:
        """The digest of a file that is there now."""
        putting, near = await Putting.of(file), near or Near()
        while True:
            try:
                with self._way.one_try(near) as channel:
                    await putting.once(channel, replay, self._metadata)
                    return putting.sha256
            except ZImageError as error:
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)

    async def get(self, sha256: str, file: Path, replay: Replay) -> None:
        """Writes a blob to a file, which appears whole and verified. What came before a break, or
        before this process, lies beside it."""
        part = file.with_name(f"{file.name}.{sha256[:16]}.part")
        near = Near()
        with _naming(file):
            while True:
                try:
                    with (
                        self._way.one_try(near) as channel,
                        closing(await asyncio.to_thread(open, part, "ab", 0)) as coming,
                    ):
                        call = _calls.get_blob(
                            channel, sha256, coming.tell(), replay.within(None), self._metadata
                        )
                        async with aclosing(call) as pieces:
                            async for piece in pieces:
                                await asyncio.to_thread(_append, coming, piece.chunk, part)
                                replay.advanced()
                                size = piece.size_bytes
                        if coming.tell() != size:
                            raise malformed(f"a blob of {size} bytes has {coming.tell()}")
                    break
                except ZImageError as error:
                    if part.exists() and not part.stat().st_size:  # nothing to go on from
                        part.unlink()
                    pause = replay.pause_after(error)
                await asyncio.sleep(pause)
            if (await asyncio.to_thread(_start, part)).sha256 != sha256:
                part.unlink()
                raise malformed(f"the blob {sha256} came with another digest")
            os.replace(part, file)


class Putting:
    """A file on its way to a service, over as many tries as it takes."""

    def __init__(self, file: Path, start: blob_pb2.PutStart) -> None:
        self._file = file
        self._start = start
        self._most = -1

    @classmethod
    async def of(cls, file: Path) -> "Putting":
        """Reads the file once, for its digest."""
        with _naming(file):
            return cls(file, await asyncio.to_thread(_start, file))

    @property
    def sha256(self) -> str:
        """The digest of the file."""
        return self._start.sha256

    async def once(self, channel: grpc.aio.Channel, replay: Replay, metadata: Metadata) -> None:
        """One try; `replay` hears how far it came."""
        call = _calls.put_blob(channel, self._start, self._file, replay.within(None), metadata)
        is_complete = False
        with _naming(self._file):
            async with aclosing(call) as answers:
                async for answer in answers:
                    is_complete |= answer.complete
                    if answer.stored_bytes > self._most:
                        self._most = answer.stored_bytes
                        replay.advanced()
        if not is_complete:
            raise malformed("it ended before the blob was there")


def _append(coming: BinaryIO, chunk: bytes, part: Path) -> None:
    before = coming.tell()
    view = memoryview(chunk)
    while view:
        view = view[coming.write(view) :]
    if coming.tell() != before + len(chunk):
        raise InvalidRequest(
            f"{part}: somebody else writes it, too; remove it and try again",
            reason="FILE",
            fields={"field": "file", "given": str(part)},
        )


def _start(path: Path) -> blob_pb2.PutStart:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return blob_pb2.PutStart(sha256=sha256, size_bytes=file.tell())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A fault of this machine's disk, with the file that was meant."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            f"{path}: {error.strerror}", reason="FILE", fields={"field": "file", "given": str(path)}
        ) from error
