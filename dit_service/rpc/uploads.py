"""What a client sends: the spec, then what the spec names by digests and the service lacks."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

from zimage_core.errors import InvalidRequest, NotFound
from zimage_core.serving import metrics
from zimage_core.serving.blobs import BlobServicer
from zimage_core.wire import embeddings
from zimage_core.wire.limits import CHUNK_BYTES
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_SILENT_SECONDS = 30.0
"""Longest wait for the client's next message: a silent one would hold up a drain."""
_SLOWEST_BYTES_PER_SECOND = 64 << 10
"""Whoever sends more slowly holds a place that others could work in."""


class Uploads:
    """The messages of one client, in the order of the grammar."""

    def __init__(
        self, requests: AsyncIterator[dit_pb2.GenerateRequest], blobs: BlobServicer
    ) -> None:
        self._requests = requests
        self._blobs = blobs
        self._has_ended = False

    async def spec(self) -> dit_pb2.GenerateSpec:
        """The first message. Where it names nothing that may be missing, it must be all."""
        first = await self._next()
        if first is None or first.WhichOneof("payload") != "spec":
            raise _refusal("no spec in the first")
        if not any(_named(first.spec)):
            await self.end()
        return first.spec

    async def gather(
        self, named: Sequence[types_pb2.Digest], need: Callable[[Iterable[types_pb2.Digest]], None]
    ) -> dict[str, bytes]:
        """The blobs of these names: from the store, or else from the client, who is told of the
        need. What it sends is kept for the next time."""
        gathered, missing = {}, {}
        for name in _once(named):
            data = await self._blobs.load(name.sha256, name.size_bytes)
            metrics.DIT_NAMED.labels("store" if data else "client").inc()
            if data is None:
                missing[name.sha256] = name
            else:
                gathered[name.sha256] = data
        if missing:
            need(missing.values())
            size = sum(name.size_bytes for name in missing.values())
            seconds = _SILENT_SECONDS + size / _SLOWEST_BYTES_PER_SECOND
            try:
                async with asyncio.timeout(seconds):
                    for sha256, name in missing.items():
                        gathered[sha256] = await self._receive(name)
            except TimeoutError:
                raise _refusal(f"not all of {size} bytes within {seconds:.0f} s") from None
        for sha256 in missing:
            self._blobs.keep(sha256, gathered[sha256])
        return gathered

    async def end(self) -> None:
        """Reads to the end of the client's messages: some proxies cut a stream that ends at one
        side first. Raises InvalidRequest for one too many."""
        if not self._has_ended and await self._next() is not None:
            raise _refusal("one too many")

    async def _receive(self, name: types_pb2.Digest) -> bytes:
        """In memory: it is about to be used, and no larger than a message."""
        data = bytearray()
        while len(data) < name.size_bytes:
            request = await self._next()
            if request is None:
                raise NotFound(
                    f"there is no blob {name.sha256}, and {len(data)} of {name.size_bytes} bytes "
                    "of it were sent",
                    reason="BLOB_NOT_FOUND",
                    fields={"sha256": name.sha256},
                )
            chunk = request.chunk
            if request.WhichOneof("payload") != "chunk" or chunk.sha256 != name.sha256:
                raise _refusal(f"something else than the next piece of blob {name.sha256}")
            most = min(CHUNK_BYTES, name.size_bytes - len(data))
            if not 1 <= len(chunk.data) <= most:
                raise _refusal(f"a piece of {len(chunk.data)} bytes where 1 to {most} are left")
            data += chunk.data
        found = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if found != name.sha256:
            raise InvalidRequest.given(
                "chunk.sha256", name.sha256, f"the digest {found} for what was sent", "BLOB_DIGEST"
            )
        return bytes(data)

    async def _next(self) -> dit_pb2.GenerateRequest | None:
        try:
            async with asyncio.timeout(_SILENT_SECONDS):
                request = await anext(self._requests, None)
        except TimeoutError:
            raise _refusal(f"nothing more within {_SILENT_SECONDS:g} s, and no end") from None
        self._has_ended = request is None
        return request


def _once(named: Sequence[types_pb2.Digest]) -> Iterable[types_pb2.Digest]:
    """Each blob once, which can only be of one size."""
    sizes = {name.sha256: name for name in named}
    for name in named:
        other = sizes[name.sha256].size_bytes
        if name.size_bytes != other:
            raise InvalidRequest.given("digest.size_bytes", name.size_bytes, f"{other}", "DIGEST")
    return sizes.values()


def _named(spec: dit_pb2.GenerateSpec) -> Iterator[types_pb2.Digest]:
    for conditioning in (spec.positive, spec.negative):
        for segment in conditioning.segments:
            if name := embeddings.named_digest(segment.embedding):
                yield name


def _refusal(given: str) -> InvalidRequest:
    allowed = "the spec, then what is needed of what it names, then the end"
    return InvalidRequest.given("messages of Generate", given, allowed, "GRAMMAR")
