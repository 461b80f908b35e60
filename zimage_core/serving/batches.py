"""Items of a stream, in the batches in which they come while others are worked on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from zimage_core.errors import ZImageError

T = TypeVar("T")


async def batched(items: AsyncIterator[T], largest: int) -> AsyncGenerator[list[T], None]:
    """Whatever has come, at least one and at most `largest`; as many again are read ahead. More are
    left to the connection, whose window makes the sender wait."""
    waiting: asyncio.Queue[T | ZImageError | None] = asyncio.Queue(largest)

    async def read() -> None:
        end: ZImageError | None = None
        try:
            async for item in items:
                await waiting.put(item)
        except ZImageError as error:
            end = error
        await waiting.put(end)

    reading = asyncio.create_task(read())
    try:
        while True:
            batch, last = [], await waiting.get()
            while last is not None and not isinstance(last, ZImageError):
                batch.append(last)
                if len(batch) == largest or waiting.empty():
                    break
                last = waiting.get_nowait()
            else:
                if batch:
                    yield batch
                if last is not None:
                    raise last
                return
            yield batch
    finally:
        reading.cancel()
