"""Items of a stream, some at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _End:
    """No item comes any more."""

    fault: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Held(Generic[R]):
    """An answer, and what it holds until it is taken."""

    answer: R
    held: AsyncExitStack


async def answers_to(
    items: AsyncIterator[T], answer: Callable[[T], AbstractAsyncContextManager[R]], at_once: int
) -> AsyncGenerator[R, None]:
    """The answer to each item as soon as it is there; so many are worked on side by side, and no
    more are read. The block of an answer ends when the next is asked for. A fault of the items
    comes after the answers."""
    working: set[asyncio.Task[_Held[R]]] = set()
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
                    working.add(asyncio.create_task(_held(answer(item))))
                    reading = asyncio.create_task(_next(items))
            for task in done & working:
                working.discard(task)
                one = task.result()
                async with one.held:
                    yield one.answer
    finally:
        await _leave({*working, *([reading] if reading else [])})
    if fault is not None:
        raise fault


async def read_ahead(items: AsyncIterator[T], most: int) -> AsyncGenerator[tuple[T, bool], None]:
    """Each item, and whether it is the last so far. So many are read ahead; more are left to the
    connection, whose window makes the sender wait."""
    waiting: asyncio.Queue[T | _End] = asyncio.Queue(most)

    async def read() -> None:
        item: T | _End | None = None
        while not isinstance(item, _End):
            item = await _next(items)
            await waiting.put(item)

    reading = asyncio.create_task(read())
    try:
        while not isinstance(item := await waiting.get(), _End):
            yield item, waiting.empty()
    finally:
        await _leave([reading])
    if item.fault is not None:
        raise item.fault


async def _leave(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Gives them up, and what those hold that were done."""
    for task in tasks:
        task.cancel()
    for one in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(one, _Held):
            await one.held.aclose()


async def _held(answer: AbstractAsyncContextManager[R]) -> _Held[R]:
    async with AsyncExitStack() as stack:
        return _Held(await stack.enter_async_context(answer), stack.pop_all())


async def _next(items: AsyncIterator[T]) -> T | _End:
    try:
        return await anext(items, _End())
    except Exception as fault:  # noqa: BLE001 - raised when the answers are out
        return _End(fault)
