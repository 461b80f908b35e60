"""Items of a stream, in the batches in which they come while others are worked on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _End:
    """No item comes any more."""

    fault: Exception | None = None


async def answers_to(
    items: AsyncIterator[T], answer: Callable[[T], Coroutine[Any, Any, R]], at_once: int
) -> AsyncGenerator[R, None]:
    """The answer to each item as soon as it is there; so many are worked on side by side, and no
    more are read. A fault of the items comes after the answers."""
    working: set[asyncio.Task[R]] = set()
    reading: asyncio.Task[T | _End] | None = asyncio.create_task(_next(items))
    fault: Exception | None = None
    try:
        while working or reading:
            tasks: set[asyncio.Task[Any]] = {*working}
            if reading and len(working) < at_once:
                tasks.add(reading)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reading in done:
                item = reading.result()
                reading = None
                if isinstance(item, _End):
                    fault = item.fault
                else:
                    working.add(asyncio.create_task(answer(item)))
                    reading = asyncio.create_task(_next(items))
            for task in done & working:
                working.discard(task)
                yield task.result()
    finally:
        left: list[asyncio.Task[Any]] = [*working, *([reading] if reading else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    if fault is not None:
        raise fault


async def _next(items: AsyncIterator[T]) -> T | _End:
    try:
        return await anext(items, _End())
    except Exception as fault:  # noqa: BLE001 - raised when the answers are out
        return _End(fault)


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
