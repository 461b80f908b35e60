"""Items of a stream: some are worked on at once, the sender waits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from zimage_core.errors import InvalidRequest
from zimage_core.serving.batches import answers_to, read_ahead


async def _numbers(count: int, fault: InvalidRequest | None = None) -> AsyncIterator[int]:
    for number in range(count):
        yield number
    if fault is not None:
        raise fault


async def test_answers_come_as_they_are_ready_and_no_more_is_read_than_is_worked_on() -> None:
    read, slow = 0, asyncio.Event()

    async def items() -> AsyncIterator[int]:
        nonlocal read
        for read in range(1, 7):
            yield read

    @asynccontextmanager
    async def answer(item: int) -> AsyncIterator[int]:
        if item == 1:
            await slow.wait()
        yield item

    async with aclosing(answers_to(items(), answer, 2)) as answers:
        seen = [await anext(answers) for _ in range(4)]
        assert seen == [2, 3, 4, 5]  # the slow one keeps one place, no more
        assert read <= 7
        slow.set()
        assert sorted([one async for one in answers]) == [1, 6]


async def test_a_fault_comes_after_the_answers() -> None:
    @asynccontextmanager
    async def answer(item: int) -> AsyncIterator[int]:
        await asyncio.sleep(0)
        yield item

    answers = answers_to(_numbers(3, InvalidRequest("broken")), answer, 2)
    assert sorted([await anext(answers) for _ in range(3)]) == [0, 1, 2]
    with pytest.raises(InvalidRequest):
        await anext(answers)


async def test_an_answer_is_held_until_the_next_is_asked_for_and_never_longer() -> None:
    held: set[int] = set()

    @asynccontextmanager
    async def answer(item: int) -> AsyncIterator[int]:
        held.add(item)
        try:
            yield item
        finally:
            held.discard(item)

    async with aclosing(answers_to(_numbers(100), answer, 3)) as answers:
        async for one in answers:
            assert one in held
            assert len(held) <= 3
            if one == 50:
                await asyncio.sleep(0)  # others are done, and nobody will take them
                break
    assert not held


async def test_an_item_is_the_last_until_the_next_has_come() -> None:
    """Read ahead, up to a bound; a fault comes after the items."""
    read = 0

    async def items() -> AsyncIterator[int]:
        nonlocal read
        for read in range(1, 9):
            yield read
        raise InvalidRequest("broken")

    async with aclosing(read_ahead(items(), 4)) as ahead:
        first = await anext(ahead)
        await asyncio.sleep(0.01)
        assert read <= 6
        rest = []
        for _ in range(7):
            rest.append(await anext(ahead))
            await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequest, match="broken"):
            await anext(ahead)
    assert [number for number, _ in (first, *rest)] == list(range(1, 9))
    assert not any(is_last for _, is_last in rest)  # behind the last stands the fault
    async with aclosing(read_ahead(_numbers(1), 4)) as ahead:
        assert [number async for number, _ in ahead] == [0]
