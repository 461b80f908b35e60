"""What was encoded is not encoded again."""

import asyncio

import pytest

from encoder_service.cache import Cache, Key
from zimage_core.embeddings import Numerics
from zimage_core.errors import NotReady
from zimage_core.tensors import TensorData

NUMERICS = Numerics("float32", "float32", "engine", "cpu")


def _key(*token_ids: int, layer: int = -2, is_solo: bool = False) -> Key:
    return Key("identity", ((layer, 1.0),), NUMERICS, token_ids, is_solo)


class Encoder:
    """Makes as many bytes as it is asked to, when it is allowed to."""

    def __init__(self) -> None:
        self.made = 0
        self.cancelled = 0
        self.may = asyncio.Event()

    async def make(self, size: int = 10) -> TensorData:
        self.made += 1
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return TensorData("uint8", (size,), bytes(size))


async def test_the_same_is_made_once_for_all_who_want_it() -> None:
    cache, encoder = Cache(100), Encoder()
    asking = [asyncio.create_task(cache.of(_key(1, 2), encoder.make)) for _ in range(3)]
    await asyncio.sleep(0)
    encoder.may.set()
    first, *others = [await one for one in asking]
    assert all(one is first for one in others)
    assert await cache.of(_key(1, 2), encoder.make) is first
    assert encoder.made == 1
    await cache.of(_key(1, 2, layer=-3), encoder.make)
    assert encoder.made == 2


async def test_what_was_wanted_longest_ago_goes_first() -> None:
    cache, encoder = Cache(30), Encoder()
    encoder.may.set()
    for token in (1, 2, 3, 1, 4):  # 1 again, before 4 comes
        await cache.of(_key(token), encoder.make)
    assert cache.bytes == 30
    before = encoder.made
    await cache.of(_key(1), encoder.make)
    assert encoder.made == before
    await cache.of(_key(2), encoder.make)
    assert encoder.made == before + 1


async def test_what_is_larger_than_all_room_is_not_kept_and_takes_none() -> None:
    cache, encoder = Cache(30), Encoder()
    encoder.may.set()
    await cache.of(_key(1), encoder.make)
    assert len((await cache.of(_key(2), lambda: encoder.make(31))).data) == 31
    assert cache.bytes == 10


async def test_one_who_gives_up_leaves_the_others_theirs() -> None:
    cache, encoder = Cache(100), Encoder()
    stays, goes = (asyncio.create_task(cache.of(_key(1), encoder.make)) for _ in range(2))
    await asyncio.sleep(0)
    goes.cancel()
    await asyncio.sleep(0)
    encoder.may.set()
    assert await stays
    assert encoder.cancelled == 0


async def test_when_all_give_up_it_ends_and_is_made_anew_for_who_comes_then() -> None:
    cache, encoder = Cache(100), Encoder()
    goes = asyncio.create_task(cache.of(_key(1), encoder.make))
    await asyncio.sleep(0)
    goes.cancel()
    comes = asyncio.create_task(cache.of(_key(1), encoder.make))  # before the first has ended
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    encoder.may.set()
    assert await comes
    assert (encoder.made, encoder.cancelled, cache.bytes) == (2, 1, 10)


async def test_who_gives_up_before_it_begins_is_in_nobodys_way() -> None:
    cache, encoder = Cache(100), Encoder()
    goes = asyncio.create_task(cache.of(_key(1), encoder.make))
    await asyncio.sleep(0)  # it waits for a task that has not begun
    goes.cancel()
    comes = asyncio.create_task(cache.of(_key(1), encoder.make))
    encoder.may.set()
    assert await comes
    assert cache.bytes == 10


async def test_a_failure_is_that_of_all_who_waited_and_of_nobody_later() -> None:
    cache, encoder = Cache(100), Encoder()

    async def fail() -> TensorData:
        await encoder.may.wait()
        raise NotReady("no", reason="NO")

    asking = [asyncio.create_task(cache.of(_key(1), fail)) for _ in range(2)]
    await asyncio.sleep(0)
    encoder.may.set()
    for one in asking:
        with pytest.raises(NotReady):
            await one
    assert await cache.of(_key(1), encoder.make)


async def test_what_was_encoded_alone_serves_all_and_what_was_not_only_those_who_share() -> None:
    cache, encoder = Cache(100), Encoder()

    def ask(token: int, *, is_solo: bool) -> asyncio.Task[TensorData]:
        return asyncio.create_task(cache.of(_key(token, is_solo=is_solo), encoder.make))

    shared = [ask(1, is_solo=False), ask(3, is_solo=True), ask(3, is_solo=False)]
    await asyncio.sleep(0)
    alone = ask(1, is_solo=True)
    await asyncio.sleep(0)
    encoder.may.set()
    assert await alone is not await shared[0]
    assert await shared[1] is await shared[2]
    assert encoder.made == 3
    assert await cache.of(_key(2, is_solo=True), encoder.make)
    assert await cache.of(_key(2), encoder.make)
    assert encoder.made == 4
