"""The items of a stream: which are under way, and which are still to come."""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Generic, TypeVar, cast

from zimage_client._conditioning import prompt_message
from zimage_client._options import spec
from zimage_client._reading import malformed
from zimage_client._replay import Replay
from zimage_core.embeddings import Prompt
from zimage_core.errors import InvalidRequest, Unavailable, ZImageError
from zimage_core.tensors import TensorData
from zimage_core.wire import tensors
from zimage_core.wire.limits import MESSAGE_BYTES
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.encoder.v1 import encoder_pb2

Item = TypeVar("Item")
Many = AsyncIterable[Item] | Iterable[Item]
Message = TypeVar("Message")
Result = TypeVar("Result")

Answers = AsyncGenerator[tuple[int, Result | ZImageError], None]
"""The number of an item, counted from 0, with what came of it."""

Call = Callable[[AsyncIterator[Message], float | None], Answers[Result]]
"""One try: sends the messages within so many seconds."""


async def replayed(
    items: Many[Item],
    message: Callable[[int, Item], Message],
    call: Call[Message, Result],
    replay: Replay,
) -> Answers[Result]:
    """The answer to each item, in any order, over as many tries as it takes; what was under way
    when a connection broke is sent again."""
    open_items = _Items(items, message)
    try:
        while True:
            answers = call(open_items.to_send(), replay.within(None))
            try:
                async with aclosing(answers):
                    async for number, result in answers:
                        replay.worked()
                        open_items.done(number)
                        replay.advanced()
                        yield number, result
                        for refused in open_items.refused():
                            yield refused
                for refused in open_items.refused():
                    yield refused
                open_items.end()
                return
            except Unavailable as error:
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)
    finally:
        open_items.close()


class _End:
    """No item comes any more."""


_END: Any = _End()


class _Items(Generic[Item, Message]):
    """Over all tries of a stream, numbered from 0."""

    def __init__(self, items: Many[Item], message: Callable[[int, Item], Message]) -> None:
        self._coming = _each(items)
        self._message = message
        self._next: asyncio.Task[Item | _End] | None = None
        self._try = 0
        """The one that sends. gRPC does not close what an earlier one was sending from."""
        self._under_way: dict[int, Message] = {}
        self._refused: list[tuple[int, InvalidRequest]] = []
        self._count = 0
        self._fault: Exception | None = None

    async def to_send(self) -> AsyncGenerator[Message, None]:
        """The messages of a try: first those that an earlier one left open."""
        self._try += 1
        own = self._try
        for message in list(self._under_way.values()):
            yield message
        try:
            while not isinstance(item := await self._taken(own), _End):
                number = self._count
                self._count += 1
                try:
                    message = self._message(number, item)
                except InvalidRequest as error:  # the others may be fine
                    self._refused.append((number, error))
                    continue
                self._under_way[number] = message
                yield message
        except Exception as fault:  # noqa: BLE001 - gRPC would not pass it on; `end` does
            self._fault = fault

    def refused(self) -> Iterator[tuple[int, InvalidRequest]]:
        """Those that cannot be sent, once each."""
        while self._refused:
            yield self._refused.pop(0)

    def done(self, number: int) -> None:
        """Strikes one off; raises InternalError for one that was not asked for."""
        if self._under_way.pop(number, None) is None:
            raise malformed(f"it answers item {number}, which was not asked for, or twice")

    def end(self) -> None:
        """Raises what kept items from being sent, or InternalError when answers are missing."""
        if self._fault is not None:
            raise self._fault
        if self._under_way:
            raise malformed("it ended before all items were answered")

    def close(self) -> None:
        """Takes no more items."""
        if self._next is not None:
            self._next.cancel()

    async def _taken(self, by: int) -> "Item | _End":
        """The next item. One that is awaited when a try breaks is there for the next."""
        if self._next is None:
            self._next = asyncio.ensure_future(_first(self._coming))
        item = await asyncio.shield(self._next)
        if by != self._try:
            return _End()
        self._next = None
        return item


def prompt_item(packing: int, number: int, prompt: str | Prompt) -> encoder_pb2.EncodeStreamRequest:
    """The message of a prompt."""
    given = Prompt(prompt) if isinstance(prompt, str) else prompt
    message = prompt_message(given)
    return encoder_pb2.EncodeStreamRequest(
        item_id=number, prompt=message, packing=cast("Any", packing)
    )


def image_item(number: int, file: bytes) -> dit_pb2.EncodeImagesRequest:
    """The message of a picture's file; raises InvalidRequest for one that no message holds."""
    return _sendable(dit_pb2.EncodeImagesRequest(item_id=number, image=file))


def latents_item(
    file_format: str, quality: int | None
) -> Callable[[int, TensorData], dit_pb2.DecodeLatentsRequest]:
    """Makes the messages of latents whose pictures are wanted in this format."""
    output = spec({"format": file_format, "quality": quality}).output  # type: ignore[typeddict-item]

    def item(number: int, latents: TensorData) -> dit_pb2.DecodeLatentsRequest:
        return _sendable(
            dit_pb2.DecodeLatentsRequest(
                item_id=number,
                latents=tensors.to_wire(latents),
                format=output.format,
                quality=quality,
            )
        )

    return item


def _sendable(message: Message) -> Message:
    size = message.ByteSize()  # type: ignore[attr-defined]
    if size > MESSAGE_BYTES:
        raise InvalidRequest(
            f"an item of {size} bytes is more than a message holds, {MESSAGE_BYTES}",
            reason="ITEM_SIZE",
            fields={"given": str(size), "allowed": str(MESSAGE_BYTES)},
        )
    return message


async def _first(items: AsyncIterator[Item]) -> "Item | _End":
    return await anext(items, _END)


async def _each(items: Many[Item]) -> AsyncIterator[Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    elif isinstance(items, list | tuple):
        for item in items:
            yield item
    else:  # it may take its time, or ask this very client for something
        coming = iter(items)
        loop = asyncio.get_running_loop()
        # A thread of its own: those that all share may all wait for something that this one gives.
        thread = ThreadPoolExecutor(1, thread_name_prefix="zimage-items")
        try:
            while True:
                taken: Item | _End = await loop.run_in_executor(thread, next, coming, _END)
                if isinstance(taken, _End):
                    return
                yield taken
        finally:
            thread.shutdown(wait=False)
