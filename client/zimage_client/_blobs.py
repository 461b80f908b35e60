"""Blobs to a service and back: in as many tries as it takes, each from where the last one ended."""

import asyncio
import hashlib
import os
from collections.abc import Iterable
from contextlib import aclosing, closing
from pathlib import Path

from zimage_client import _calls
from zimage_client._channel import Metadata, Near, Way
from zimage_client._reading import malformed
from zimage_client._replay import Replay
from zimage_core.errors import InvalidRequest, ZImageError
from zimage_core.wire.limits import DIGESTS_PER_FIND
from zimage_rpc.types.v1 import types_pb2


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

    async def put(self, file: Path, replay: Replay) -> str:
        """The digest of a file that is there now."""
        digest = await asyncio.to_thread(_digest, file)
        near, most = Near(), -1
        while True:
            try:
                with self._way.one_try(near) as channel:
                    call = _calls.put_blob(
                        channel, digest, file, replay.within(None), self._metadata
                    )
                    async with aclosing(call) as answers:
                        async for answer in answers:
                            if answer.complete:
                                return digest.sha256
                            if answer.stored_bytes > most:
                                most = answer.stored_bytes
                                replay.advanced()
                    raise malformed("it ended before the blob was there")
            except ZImageError as error:
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)

    async def get(self, sha256: str, file: Path, replay: Replay) -> None:
        """Writes a blob to a file, which appears whole and verified. What came before a break, or
        before this process, lies beside it."""
        part = file.with_name(f"{file.name}.{sha256[:16]}.part")
        near = Near()
        while True:
            try:
                with (
                    self._way.one_try(near) as channel,
                    closing(await asyncio.to_thread(open, part, "ab")) as coming,
                ):
                    call = _calls.get_blob(
                        channel, sha256, coming.tell(), replay.within(None), self._metadata
                    )
                    async with aclosing(call) as pieces:
                        async for piece in pieces:
                            await asyncio.to_thread(coming.write, piece.chunk)
                            replay.advanced()
                            size = piece.size_bytes
                    if coming.tell() != size:
                        raise malformed(f"a blob of {size} bytes has {coming.tell()}")
                break
            except ZImageError as error:
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)
        if (await asyncio.to_thread(_digest, part)).sha256 != sha256:
            part.unlink()
            raise malformed(f"the blob {sha256} came with another digest")
        os.replace(part, file)


def _digest(path: Path) -> types_pb2.Digest:
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return types_pb2.Digest(sha256=sha256, size_bytes=file.tell())
    except OSError as error:
        raise InvalidRequest(
            f"{path}: {error.strerror}", reason="FILE", fields={"field": "file", "given": str(path)}
        ) from error
