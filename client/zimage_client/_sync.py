"""The synchronous client: the asynchronous one, on an event loop in a thread of its own."""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, Unpack, overload

from zimage_client import _calls
from zimage_client._client import AsyncClient
from zimage_client._conditioning import Condition, Prompts
from zimage_client._description import (
    Adapter,
    DitDescription,
    EncoderDescription,
    TokenCount,
    Trace,
)
from zimage_client._events import DecodedImage, Event, Generated
from zimage_client._items import Many
from zimage_client._options import Options, Packing
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import Cancelled, ZImageError
from zimage_core.tensors import TensorData
from zimage_core.tls import Credentials

_FINISHING_SECONDS = 10.0

T = TypeVar("T")
Answers = Generator[tuple[int, T | ZImageError], None, None]
"""The number of an item, counted from 0, with what came of it."""


class Closing(Protocol):
    """An asynchronous client."""

    async def aclose(self) -> None:
        """Ends its connections."""


class Face:
    """A synchronous client's life."""

    def __init__(self, client: Closing) -> None:
        self._work = Work(client)
        self._closing = weakref.finalize(self, self._work.close)  # also at the interpreter's exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections and whatever runs over them."""
        self._closing()


class Client(Face):
    """As AsyncClient, for code without an event loop, or beside one as in a notebook.

    May be used from several threads.
    """

    def __init__(
        self, server: str = "", encoder: str = "", **credentials: Unpack[Credentials]
    ) -> None:
        self._client = AsyncClient(server, encoder, **credentials)
        super().__init__(self._client)

    def generate(self, prompt: Condition, **options: Unpack[Options]) -> Generated:
        """Makes pictures; returns when all of them are there."""
        return self._work.run(self._client.generate(prompt, **options))

    def stream(self, prompt: Condition, **options: Unpack[Options]) -> Generator[Event, None, None]:
        """Makes pictures and tells how it goes on; leaving the loop early cancels the request."""
        return iterate(self, self._work, self._client.stream(prompt, **options))

    @overload
    def encode(
        self,
        prompt: str | Prompt,
        *,
        packing: Packing = ...,
        timeout: float | None = ...,
        retry: bool = ...,
    ) -> Embedding: ...
    @overload
    def encode(
        self,
        prompt: Prompts,
        *,
        packing: Packing = ...,
        timeout: float | None = ...,
        retry: bool = ...,
    ) -> list[Embedding]: ...
    def encode(
        self,
        prompt: str | Prompt | Prompts,
        *,
        packing: Packing = "shared",
        timeout: float | None = _calls.ENCODE_SECONDS,
        retry: bool = True,
    ) -> Embedding | list[Embedding]:
        """Encodes one prompt, or several in order, as AsyncClient's does."""
        encode = partial(self._client.encode, packing=packing, timeout=timeout, retry=retry)
        return self._work.run(encode(prompt))

    def count_tokens(
        self,
        prompts: Prompts,
        *,
        timeout: float | None = _calls.DESCRIBE_SECONDS,
    ) -> list[TokenCount]:
        """How many tokens prompts have, and what would become of them; encodes nothing."""
        return self._work.run(self._client.count_tokens(prompts, timeout=timeout))

    def encode_stream(
        self,
        prompts: Many[str | Prompt],
        *,
        packing: Packing = "shared",
        timeout: float | None = None,
    ) -> Answers[Embedding]:
        """Encodes any number of prompts, each for itself, as AsyncClient's does. The iterable is
        read in the client's own thread."""
        answers = self._client.encode_stream(prompts, packing=packing, timeout=timeout)
        return iterate(self, self._work, answers)

    def encode_images(
        self, files: Many[bytes], *, timeout: float | None = None
    ) -> Answers[TensorData]:
        """Turns pictures into latents, each for itself, as AsyncClient's does."""
        return iterate(self, self._work, self._client.encode_images(files, timeout=timeout))

    def decode_latents(
        self,
        latents: Many[TensorData],
        *,
        format: Literal["png", "jpeg", "webp"] = "png",
        quality: int | None = None,
        timeout: float | None = None,
    ) -> Answers[DecodedImage]:
        """Turns latents into pictures, each for itself, as AsyncClient's does."""
        images = self._client.decode_latents(
            latents, format=format, quality=quality, timeout=timeout
        )
        return iterate(self, self._work, images)

    def put_blob(self, file: str | Path, *, timeout: float | None = None) -> str:
        """Sends a file to the DiT service's store, as AsyncClient's does."""
        return self._work.run(self._client.put_blob(file, timeout=timeout))

    def get_blob(self, sha256: str, file: str | Path, *, timeout: float | None = None) -> None:
        """Writes a blob to a file, as AsyncClient's does."""
        self._work.run(self._client.get_blob(sha256, file, timeout=timeout))

    def find_blobs(
        self, digests: Iterable[str], *, timeout: float | None = _calls.DESCRIBE_SECONDS
    ) -> set[str]:
        """Those of the blobs that the DiT service has."""
        return self._work.run(self._client.find_blobs(digests, timeout=timeout))

    def add_adapter(
        self,
        name: str,
        file: str | Path,
        *,
        replace: bool = False,
        timeout: float | None = None,
    ) -> Adapter:
        """Gives a LoRA a name, as AsyncClient's does."""
        return self._work.run(
            self._client.add_adapter(name, file, replace=replace, timeout=timeout)
        )

    def get_adapter(self, name: str, *, timeout: float | None = _calls.ADAPTER_SECONDS) -> Adapter:
        """What is known of an adapter."""
        return self._work.run(self._client.get_adapter(name, timeout=timeout))

    def list_adapters(self, *, timeout: float | None = _calls.ADAPTER_SECONDS) -> list[Adapter]:
        """The adapters that have names, in the order of these."""
        return self._work.run(self._client.list_adapters(timeout=timeout))

    def remove_adapter(self, name: str, *, timeout: float | None = _calls.ADAPTER_SECONDS) -> None:
        """Takes the name of an adapter away."""
        self._work.run(self._client.remove_adapter(name, timeout=timeout))

    def describe(self, *, timeout: float | None = _calls.DESCRIBE_SECONDS) -> DitDescription:
        """What the DiT service is and can do; answered while it loads, too."""
        return self._work.run(self._client.describe(timeout=timeout))

    def trace(
        self, last_seconds: float | None = None, *, timeout: float | None = _calls.TRACE_SECONDS
    ) -> Trace:
        """What the DiT service's device did of late, as of AsyncClient."""
        return self._work.run(self._client.trace(last_seconds, timeout=timeout))

    def describe_encoder(
        self, *, timeout: float | None = _calls.DESCRIBE_SECONDS
    ) -> EncoderDescription:
        """What the encoder service is and can do; answered while it loads, too."""
        return self._work.run(self._client.describe_encoder(timeout=timeout))


class _Background:
    """The event loop of all clients of this process, in a thread of its own. There is one for all,
    because gRPC holds on to every loop that it has ever met."""

    _lock = threading.Lock()
    _one: "_Background | None" = None

    def __init__(self) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=_run, args=[started], name="zimage-client", daemon=True
        )
        self._thread.start()
        self.loop, self._over = started.result()
        weakref.finalize(self, self._stop)  # at the interpreter's exit, after those of its clients

    @classmethod
    def shared(cls) -> "_Background":
        """The one of this process; the child of a fork has one of its own."""
        with cls._lock:
            if cls._one is None or not cls._one.is_alive:
                cls._one = cls()
            return cls._one

    @property
    def is_alive(self) -> bool:
        """Whether work can be given to it."""
        return self._thread.is_alive()

    @property
    def is_here(self) -> bool:
        """Whether this is its own thread, where garbage may be collected as anywhere."""
        return threading.current_thread() is self._thread

    def _stop(self) -> None:
        if self.is_alive:
            self.loop.call_soon_threadsafe(self._over.set)
            self._thread.join()


def _run(started: "Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]") -> None:
    try:
        asyncio.run(_serve(started))
    except OSError as error:  # such as too many open files; who waits for it hears of it
        if started.done():
            raise
        started.set_exception(error)


async def _serve(started: "Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]") -> None:
    over = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), over))
    await over.wait()


class Work:
    """What one client does in the background."""

    def __init__(self, client: Closing) -> None:
        self._client = client
        self._background = _Background.shared()
        self._running: set[Future[Any]] = set()
        self._is_closed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for the work's result; being interrupted meanwhile cancels the work."""
        future = self._begun(work)
        if future is None:
            raise Cancelled("the client is closed")
        try:
            return future.result()
        except CancelledError:
            raise Cancelled("the client was closed with this call in flight") from None
        except BaseException:
            future.cancel()
            raise
        finally:
            self._running.discard(future)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the last work of something that is given up, whoever does that and when."""
        future = self._begun(work)
        if future is not None:
            future.add_done_callback(self._running.discard)
            if not self._background.is_here:
                with suppress(CancelledError, TimeoutError):  # the client was closed meanwhile
                    future.result(_FINISHING_SECONDS)

    def close(self) -> None:
        """Ends the connections and whatever runs over them."""
        is_first, self._is_closed = not self._is_closed, True
        if is_first and self._background.is_alive:
            for future in list(self._running):
                future.cancel()
            closing = asyncio.run_coroutine_threadsafe(self._client.aclose(), self._background.loop)
            if not self._background.is_here:
                closing.result()

    def _begun(self, work: Coroutine[Any, Any, T]) -> Future[T] | None:
        """Without a lock: garbage may be collected at any line, and finish other work of ours."""
        if self._is_closed or not self._background.is_alive:
            work.close()
            return None
        future = asyncio.run_coroutine_threadsafe(work, self._background.loop)
        self._running.add(future)
        if self._is_closed:  # it was closed meanwhile, and did not see this one
            future.cancel()
        return future


def iterate(owner: object, work: Work, events: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """The events; holds the client, which is closed when nobody does."""
    try:
        while (event := work.run(_next(events))) is not None:
            yield event
    finally:
        work.finish(_close(events))


async def _next(events: AsyncGenerator[T, None]) -> T | None:
    return await anext(events, None)


async def _close(events: AsyncGenerator[T, None]) -> None:
    await events.aclose()
