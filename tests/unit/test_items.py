"""Streams of items over connections that break."""

import asyncio
from collections.abc import AsyncIterator

from zimage_client._items import Answers, replayed
from zimage_client._replay import Replay
from zimage_core.errors import Unavailable

BROKEN = Unavailable("the connection broke", reason="UNREACHABLE")


async def test_a_try_that_broke_takes_no_more_items() -> None:
    """gRPC goes on to ask for the next message of a call that has ended by itself."""
    fed: asyncio.Queue[str | None] = asyncio.Queue()
    askers = []

    async def items() -> AsyncIterator[str]:
        while (item := await fed.get()) is not None:
            yield item

    async def call(messages: AsyncIterator[str], _seconds: float | None) -> Answers[str]:
        if not askers:
            askers.append(asyncio.ensure_future(anext(messages, "nothing")))
            await asyncio.sleep(0)
            raise BROKEN
        fed.put_nowait("a")
        fed.put_nowait("b")
        fed.put_nowait(None)
        async for message in messages:
            number, _, item = message.partition(" ")
            yield int(number), item

    answers = replayed(items(), "{} {}".format, call, Replay())
    assert [answer async for answer in answers] == [(0, "a"), (1, "b")]
    assert await askers[0] == "nothing"


async def test_a_stream_that_gets_on_outlives_any_number_of_breaks() -> None:
    async def call(messages: AsyncIterator[str], _seconds: float | None) -> Answers[str]:
        async for message in messages:
            number, _, item = message.partition(" ")
            yield int(number), item
            await anext(messages, None)  # it is under way
            raise BROKEN

    answers = replayed([*"abcdefghijkl"], "{} {}".format, call, Replay())
    assert [answer async for answer in answers] == [*enumerate("abcdefghijkl")]
