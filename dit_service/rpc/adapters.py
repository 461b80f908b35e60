"""Adapters by their names: names in the store point at files in the store, which every replica with
that store shares."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from dit_service import messages
from zimage_core import digests
from zimage_core.errors import InvalidRequest, NotFound, NotReady, Unavailable
from zimage_core.formats.adapter_file import read_plan
from zimage_core.planning.flops import DitShape
from zimage_core.planning.linears import linears
from zimage_core.serving import access
from zimage_core.store.blobs import Blobs, check_name
from zimage_core.wire.limits import ADAPTERS_PER_REQUEST
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_MEDIA_TYPE = "application/vnd.safetensors"
_USUAL_PAGE, _LARGEST_PAGE = 100, 1000
_LONGEST_TEXT, _MOST_TEXTS = 1024, 64
_NAMED_IN_ERRORS = 5
_THREADS = 4
_STORE_SECONDS = 10.0
"""For names, which are small files."""
_RETRY_SECONDS = 5.0

T = TypeVar("T")


class Adapters:
    """Those of each project. Disks are waited for in threads of its own, and not for ever."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapters")
        self._naming = threading.Lock()

    async def decide(self, uses: Sequence[dit_pb2.AdapterUse]) -> None:
        """Enters which files are meant; raises InvalidRequest, or NotFound for one that is not
        there."""
        if len(uses) > ADAPTERS_PER_REQUEST:
            allowed = f"{ADAPTERS_PER_REQUEST} at most"
            raise InvalidRequest.given("spec.adapters", len(uses), allowed, "ADAPTER_COUNT")
        kind = _kind()
        for index, use in enumerate(uses):
            await self._in_thread(self._decide, kind, use, f"spec.adapters[{index}]")

    async def fetched(self, uses: Iterable[dit_pb2.AdapterUse]) -> tuple[messages.AdapterUse, ...]:
        """With their files on this machine."""
        scales: dict[str, float] = {}
        for use in uses:  # the same file by two names is used once
            scales[use.digest.sha256] = scales.get(use.digest.sha256, 0.0) + use.scale
        sizes = {use.digest.sha256: use.digest.size_bytes for use in uses}
        return tuple(
            [
                messages.AdapterUse(sha256, sizes[sha256], await self._file(sha256), scale)
                for sha256, scale in scales.items()
                if scale
            ]
        )

    async def add(self, request: dit_pb2.AddAdapterRequest, shape: DitShape) -> dit_pb2.Adapter:
        """Gives a file a name, if it is an adapter for a model of this shape."""
        kind, name, sha256 = _kind(), request.name, request.sha256
        adapter = await self._looked_into(name, sha256, shape)

        def point() -> None:
            with self._naming:
                try:
                    there = self._blobs.pointed_at(kind, name)
                except NotFound:
                    there = sha256
                if there != sha256 and not request.replace:
                    raise NotReady(
                        f"there is an adapter {name} with another file ({there}); say that it "
                        "shall be replaced, or take another name",
                        reason="ADAPTER_EXISTS",
                        fields={"field": "name", "given": name},
                    )
                self._blobs.point(kind, name, sha256)

        await self._in_thread(point)
        return adapter

    async def get(self, name: str, shape: DitShape) -> dit_pb2.Adapter:
        """All that is known of one."""
        sha256 = await self._in_thread(self._pointed_at, _kind(), name, "name")
        return await self._looked_into(name, sha256, shape)

    async def list(self, request: dit_pb2.ListAdaptersRequest) -> dit_pb2.ListAdaptersResponse:
        """A page of names and files."""
        count = request.page_size or _USUAL_PAGE
        if not 1 <= count <= _LARGEST_PAGE:
            allowed = f"1 to {_LARGEST_PAGE}"
            raise InvalidRequest.given("page_size", count, allowed, "PAGE_SIZE")
        return await self._in_thread(self._page, _kind(), count, request.page_token)

    async def remove(self, name: str) -> None:
        """Takes a name away; raises NotFound."""
        kind = _kind()
        await self._in_thread(self._pointed_at, kind, name, "name")
        await self._in_thread(self._blobs.forget, kind, name)

    def _decide(self, kind: str, use: dit_pb2.AdapterUse, field: str) -> None:
        if use.name:
            check_name(use.name, f"{field}.name")
        if not use.HasField("digest"):
            use.digest.sha256 = self._pointed_at(kind, use.name, f"{field}.name")
        digests.check(use.digest.sha256, f"{field}.digest.sha256")
        found = self._blobs.find(use.digest.sha256)
        if not found.complete:
            raise _missing(use.digest.sha256)
        use.digest.CopyFrom(_digest(use.digest.sha256, found.stored_bytes))

    def _pointed_at(self, kind: str, name: str, field: str) -> str:
        try:
            return self._blobs.pointed_at(kind, name)
        except NotFound:
            there = self._blobs.names(kind)
            few = ", ".join(there[:_NAMED_IN_ERRORS]) or "none"
            more = ", ..." if len(there) > _NAMED_IN_ERRORS else ""
            raise NotFound(
                f"{field}: there is no adapter {name}; there is {few}{more}",
                reason="ADAPTER_NOT_FOUND",
                fields={"field": field, "given": name},
            ) from None

    async def _file(self, sha256: str) -> Path:
        """Takes as long as it takes where the store is elsewhere."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._blobs.local, sha256)
        except NotFound:
            raise _missing(sha256) from None

    async def _in_thread(self, work: Callable[..., T], *given: object) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                return await loop.run_in_executor(self._threads, partial(work, *given))
        except TimeoutError:
            raise Unavailable(
                f"the store did not answer within {_STORE_SECONDS:g} s",
                reason="STORE_UNAVAILABLE",
                retry_after=_RETRY_SECONDS,
            ) from None

    async def _looked_into(self, name: str, sha256: str, shape: DitShape) -> dit_pb2.Adapter:
        file = await self._file(sha256)
        size, plan = await self._in_thread(
            lambda: (file.stat().st_size, read_plan(file, linears(shape)))
        )
        texts = sorted(plan.metadata.items())[:_MOST_TEXTS]
        return dit_pb2.Adapter(
            name=name,
            digest=_digest(sha256, size),
            rank=plan.rank,
            linear_count=len(plan.changes),
            metadata={_sayable(key): _sayable(text) for key, text in texts},
        )

    def _page(self, kind: str, count: int, after: str) -> dit_pb2.ListAdaptersResponse:
        names = [name for name in self._blobs.names(kind) if name > after]
        answer = dit_pb2.ListAdaptersResponse()
        for name in names[:count]:
            try:
                sha256 = self._blobs.pointed_at(kind, name)
            except NotFound:  # taken away just now
                continue
            size = self._blobs.find(sha256).stored_bytes
            answer.adapters.add(name=name, digest=_digest(sha256, size))
        if len(names) > count:
            answer.next_page_token = names[count - 1]
        return answer


def _kind() -> str:
    """Under which names of the store those of the caller's project stand."""
    return f"adapters/{access.project()}"


def _sayable(text: str) -> str:
    """A text of a file, which may be of any length and hold half characters."""
    return text[:_LONGEST_TEXT].encode(errors="replace").decode()


def _digest(sha256: str, size_bytes: int) -> types_pb2.Digest:
    return types_pb2.Digest(sha256=sha256, size_bytes=size_bytes, media_type=_MEDIA_TYPE)


def _missing(sha256: str) -> NotFound:
    return NotFound(
        f"there is no adapter {sha256}: such a file is not in this service's store",
        reason="ADAPTER_NOT_FOUND",
        fields={"sha256": sha256},
    )
