"""Files that a session names: those that the store has, and those that its client is asked for and
sends while it goes on with other things."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from zimage_core import digests
from zimage_core.errors import InvalidRequest, NotFound
from zimage_core.store.blobs import Blobs
from zimage_core.store.incoming import Incoming
from zimage_core.wire.limits import CHUNK_BYTES
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_SILENT_SECONDS = 60.0
"""Longest wait for what was asked for while nothing of it comes."""

T = TypeVar("T")


class Arrivals:
    """Of one session. Disks are waited for in a thread of its own."""

    def __init__(self, blobs: Blobs, need: Callable[[list[types_pb2.Digest]], None]) -> None:
        """`need` tells the client what to send."""
        self._blobs = blobs
        self._need = need
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arrivals")
        self._coming: dict[str, _Coming] = {}
        self._is_closed = False

    async def files(self, named: Sequence[types_pb2.Digest]) -> list[tuple[str, Path]]:
        """With their digests, in order; each is what its digest says."""
        there: dict[str, Path] = {}
        missing: dict[str, types_pb2.Digest] = {}
        for name in named:
            digests.check(name.sha256, "digest.sha256")
            if name.sha256 not in there and name.sha256 not in missing:
                try:
                    there[name.sha256] = await self._in_thread(self._blobs.local, name.sha256)
                except NotFound:
                    missing[name.sha256] = name
        if missing:
            for sha256, name in missing.items():
                self._coming[sha256] = _Coming(name.size_bytes)
            self._need(list(missing.values()))
            for sha256 in missing:
                await self._coming[sha256].arrived()
                del self._coming[sha256]
                there[sha256] = await self._in_thread(self._blobs.local, sha256)
        return [(name.sha256, there[name.sha256]) for name in named]

    async def take(self, chunk: dit_pb2.BlobChunk) -> None:
        """A piece of what was asked for; raises InvalidRequest for one that was not."""
        coming = self._coming.get(chunk.sha256)
        if coming is None:
            given = f"a piece of {chunk.sha256[:64]}"
            raise InvalidRequest.given("chunk", given, "pieces of what is needed", "GRAMMAR")
        if not 1 <= len(chunk.data) <= CHUNK_BYTES:
            given = f"{len(chunk.data)} bytes"
            raise InvalidRequest.given("chunk.data", given, f"1 to {CHUNK_BYTES}", "CHUNK_SIZE")
        await self._in_thread(self._keep, chunk, coming)
        coming.came(len(chunk.data))

    def _keep(self, chunk: dit_pb2.BlobChunk, coming: "_Coming") -> None:
        if coming.received_bytes == 0:
            coming.incoming = self._blobs.receive(chunk.sha256, coming.size_bytes)
        if coming.incoming is None:
            return  # somebody else has brought it meanwhile
        already = coming.incoming.stored_bytes - coming.received_bytes  # of an earlier try
        coming.incoming.add(chunk.data[max(0, already) :])
        if coming.received_bytes + len(chunk.data) == coming.size_bytes:
            self._blobs.complete(chunk.sha256, coming.incoming)
            coming.incoming.close()

    def close(self) -> None:
        """What came in part stays for the next time."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.submit(self._leave)  # behind a piece that it is about to keep
            self._thread.shutdown(wait=False)

    def _leave(self) -> None:
        for coming in self._coming.values():
            if coming.incoming is not None:
                coming.incoming.close()

    async def _in_thread(self, work: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)


class _Coming:
    """A file on its way."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.received_bytes = 0
        self.incoming: Incoming | None = None
        self._moved = asyncio.Event()

    def came(self, byte_count: int) -> None:
        """So many more are there."""
        self.received_bytes += byte_count
        self._moved.set()

    async def arrived(self) -> None:
        """Returns when all of it is there; raises InvalidRequest when no more comes."""
        while self.received_bytes < self.size_bytes:
            self._moved.clear()
            try:
                async with asyncio.timeout(_SILENT_SECONDS):
                    await self._moved.wait()
            except TimeoutError:
                given = f"{self.received_bytes} of {self.size_bytes} bytes"
                allowed = f"more within {_SILENT_SECONDS:g} s"
                raise InvalidRequest.given("chunk", given, allowed, "GRAMMAR") from None
