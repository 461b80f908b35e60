"""Batches of a stream: what has come is taken, order is kept, the sender waits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from zimage_core.errors import InvalidRequest
from zimage_core.serving.batches import answers_to, batched


async def _numbers(count: int, fault: InvalidRequest | None = None) -> AsyncIterator[int]:
    for number in range(count):
        yield number
    if fault is not None:
        raise fault


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9, 100])
async def test_every_item_comes_once_and_in_order(count: int) -> None:
    sizes, seen = [], []
    async with aclosing(batched(_numbers(count), 4)) as batches:
        async for batch in batches:
            sizes.append(len(batch))
            seen += batch
            await asyncio.sleep(0)  # the work, in which others come
    assert seen == list(range(count))
    assert all(1 <= size <= 4 for size in sizes)
    assert count < 10 or max(sizes) == 4


async def test_the_sender_waits_for_slow_work() -> None:
    sent = 0

    async def items() -> AsyncIterator[int]:
        nonlocal sent
        for sent in range(1_000):
            yield sent

    async with aclosing(batched(items(), 4)) as batches:
        await anext(batches)
        await asyncio.sleep(0.05)
        assert sent <= 10


async def test_a_fault_of_the_stream_comes_after_what_was_good() -> None:
    async with aclosing(batched(_numbers(6, InvalidRequest("bad bytes")), 4)) as batches:
        assert await anext(batches) == [0, 1, 2, 3]
        assert await anext(batches) == [4, 5]
        with pytest.raises(InvalidRequest, match="bad bytes"):
            await anext(batches)


async def test_answers_come_as_they_are_ready_and_no_more_is_read_than_is_worked_on() -> None:
    read, slow = 0, asyncio.Event()

    async def items() -> AsyncIterator[int]:
        nonlocal read
        for read in range(1, 7):
            yield read

    async def answer(item: int) -> int:
        if item == 1:
            await slow.wait()
        return item

    async with aclosing(answers_to(items(), answer, 2)) as answers:
        seen = [await anext(answers) for _ in range(4)]
        assert seen == [2, 3, 4, 5]  # the slow one keeps one place, no more
        assert read <= 7
        slow.set()
        assert sorted([one async for one in answers]) == [1, 6]


async def test_a_fault_comes_after_the_answers() -> None:
    async def answer(item: int) -> int:
        await asyncio.sleep(0)
        return item

    answers = answers_to(_numbers(3, InvalidRequest("broken")), answer, 2)
    assert sorted([await anext(answers) for _ in range(3)]) == [0, 1, 2]
    with pytest.raises(InvalidRequest):
        await anext(answers)
