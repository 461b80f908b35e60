"""Items of a stream, in the batches in which they come while others are worked on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _End:
    """No item comes any more."""

    fault: Exception | None = None


async def answered(
    items: AsyncIterator[T], answer: Callable[[T], Coroutine[Any, Any, R]], at_once: int
) -> AsyncGenerator[R, None]:
    """The answer to each item as soon as it is there; so many are worked on side by side."""
    async with aclosing(batched(items, at_once)) as batches:
        async for batch in batches:
            working = [asyncio.ensure_future(answer(item)) for item in batch]
            try:
                for done in asyncio.as_completed(working):
                    yield await done
            finally:
                for work in working:
                    work.cancel()
                await asyncio.gather(*working, return_exceptions=True)


async def batched(items: AsyncIterator[T], largest: int) -> AsyncGenerator[list[T], None]:
    """Whatever has come, at least one and at most `largest`; as many again are read ahead. More are
    left to the connection, whose window makes the sender wait."""
    waiting: asyncio.Queue[T | _End] = asyncio.Queue(largest)

    async def read() -> None:
        end = _End()
        try:
            async for item in items:
                await waiting.put(item)
        except Exception as error:  # noqa: BLE001 - raised where the batches are taken
            end = _End(error)
        await waiting.put(end)

    reading = asyncio.create_task(read())
    try:
        while True:
            came = [await waiting.get()]
            while len(came) < largest and not waiting.empty():
                came.append(waiting.get_nowait())
            if batch := [item for item in came if not isinstance(item, _End)]:
                yield batch
            if isinstance(came[-1], _End):
                if came[-1].fault is not None:
                    raise came[-1].fault
                return
    finally:
        reading.cancel()
