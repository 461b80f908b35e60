"""Several addresses of one service: one that refuses or is gone is left for another at once."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.e2e.services import free_address
from tests.fakes import services
from tests.fakes.services import Act, FakeDit, FakeEncoder
from zimage_client import (
    AsyncClient,
    DeadlineTooShort,
    InvalidRequest,
    Overloaded,
    Unavailable,
    Waiting,
)
from zimage_core.errors import ZImageError

FULL = Overloaded("the queue is full", reason="QUEUE_FULL", retry_after=30)
LOADING = Unavailable("the model is being loaded", reason="LOADING", retry_after=30)


@asynccontextmanager
async def _client_of(
    *fakes: FakeDit | FakeEncoder, nobody: bool = False
) -> AsyncIterator[AsyncClient]:
    async with AsyncExitStack() as stack:
        at: dict[str, list[str]] = {"server": [], "encoder": []}
        for fake in fakes:
            if isinstance(fake, FakeDit):
                at["server"].append(
                    (await stack.enter_async_context(services.serving(fake))).server
                )
            else:
                found = await stack.enter_async_context(services.serving(None, fake))
                at["encoder"].append(found.encoder)
        if nobody:
            for addresses in filter(None, at.values()):
                addresses.append(free_address())
        given = {name: ",".join(addresses) for name, addresses in at.items()}
        yield await stack.enter_async_context(AsyncClient(**given))


async def test_calls_go_round_the_replicas() -> None:
    fakes = [FakeDit() for _ in range(3)]
    async with _client_of(*fakes) as client:
        for _ in range(6):
            await client.generate("x")
    assert [len(fake.specs) for fake in fakes] == [2, 2, 2]


@pytest.mark.parametrize("error", [FULL, LOADING, Act.BREAK])
async def test_one_that_refuses_or_breaks_is_left_for_another(error: ZImageError | Act) -> None:
    fakes = [FakeDit(*[[error]] * 9), FakeDit()]
    began = time.monotonic()
    async with _client_of(*fakes) as client:
        for _ in range(3):
            await client.generate("x")
    assert time.monotonic() - began < 10  # and not the 30 s that the first one asks for
    assert len(fakes[1].specs) == 3


async def test_when_all_refuse_the_client_waits_as_it_is_told() -> None:
    soon = Overloaded("the queue is full", reason="QUEUE_FULL", retry_after=0.2)
    fakes = [FakeDit([soon]), FakeDit([soon])]
    async with _client_of(*fakes) as client:
        waits = [event async for event in client.stream("x") if isinstance(event, Waiting)]
    assert [event.seconds for event in waits] == [0.0, 0.2]
    assert sum(len(fake.specs) for fake in fakes) == 3


async def test_nobody_waits_long_at_an_address_where_nobody_is() -> None:
    dit, encoder = FakeDit(), FakeEncoder()
    began = time.monotonic()
    async with _client_of(dit, encoder, nobody=True) as client:
        for _ in range(4):
            await client.generate("x")
            await client.encode("x")
            await client.describe()
            assert (await client.describe_encoder()).ready
    assert len(dit.specs) == 4
    assert time.monotonic() - began < 10


async def test_when_nobody_is_anywhere_the_error_says_so() -> None:
    first, second = free_address(), free_address()
    async with AsyncClient(f"{first},{second}") as client:
        with pytest.raises(Unavailable) as caught:
            await client.generate("x", timeout=1.0)
    assert caught.value.reason == "UNREACHABLE"
    where, tries = caught.value.__notes__[:2]
    assert where in [
        f"the server asked was {one}, one of {first}, {second}" for one in (first, second)
    ]
    assert tries.startswith("tried ")


async def test_one_whose_queue_is_too_long_for_the_deadline_is_left_for_another() -> None:
    late = DeadlineTooShort("not before tomorrow", reason="DEADLINE_UNREACHABLE")
    fakes = [FakeDit([late], [late]), FakeDit()]
    async with _client_of(*fakes) as client:
        for _ in range(2):
            await client.generate("x", timeout=30)
    assert len(fakes[1].specs) == 2


async def test_what_an_older_replica_does_not_know_is_asked_of_another() -> None:
    unknown = InvalidRequest("unknown field 99", reason="UNKNOWN_FIELD")
    old, new = FakeDit([unknown], [unknown]), FakeDit()
    async with _client_of(old, new) as client:
        for _ in range(2):
            await client.generate("x")
    async with _client_of(FakeDit([unknown]), FakeDit([unknown])) as client:
        with pytest.raises(InvalidRequest):
            await client.generate("x")
