"""Who is encoded with whom, in a real worker with a real small model."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from encoder_service.messages import Encode, Encoded
from zimage_core.errors import NotReady
from zimage_core.serving.worker import Worker
from zimage_core.settings import EncoderSettings, Watchdog

pytestmark = pytest.mark.asyncio(loop_scope="module")

_USUAL = ((-2, 1.0),)
_TOKENS_AT_ONCE = 40
_PLUG_TOKENS = 4000
"""Run for so long that all the others have come by then."""
_UNKNOWN = 10**6
_plugs = itertools.count(20)
"""Their first tokens: none goes on from another."""
PATIENCE_SECONDS = 40


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> EncoderSettings:
    return EncoderSettings(
        model=model_folder, dtype="float32", max_batch_ms=1e6, max_batch_tokens=_TOKENS_AT_ONCE
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def worker(settings: EncoderSettings) -> AsyncIterator[Worker]:
    ready = asyncio.Event()
    worker = Worker(
        "encoder_service.engine.worker:main", settings, Watchdog(), lambda _is_ready: ready.set()
    )
    supervision = asyncio.create_task(worker.supervise())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await ready.wait()
        yield worker
    finally:
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)


class Calls:
    """Prompts that all wait behind one that takes long."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.ended: list[tuple[int, ...]] = []
        """The prompts in the order in which they were done."""
        self._asked: list[asyncio.Task[Encoded]] = []
        self._plug = self.ask(next(_plugs), caller=0, length=_PLUG_TOKENS)

    def ask(
        self, *ids: int, caller: int, length: int = 10, is_solo: bool = False
    ) -> asyncio.Task[Encoded]:
        """A prompt of so many tokens that begins with these."""
        prompt = (*ids, *([7] * (length - len(ids))))
        call = Encode(prompt, _USUAL, caller, is_solo)
        self._asked.append(asyncio.create_task(self._ended(ids, call)))
        return self._asked[-1]

    async def _ended(self, ids: tuple[int, ...], call: Encode) -> Encoded:
        [encoded] = [event async for event in self._worker.call(call)]
        self.ended.append(ids)
        assert isinstance(encoded, Encoded)
        return encoded

    async def over(self) -> None:
        """All are done."""
        await asyncio.gather(*self._asked)

    async def told(self) -> None:
        """All that was asked is under way."""
        await asyncio.sleep(0)
        assert not self._plug.done()


async def test_batches_are_as_large_as_they_may_be(worker: Worker) -> None:
    calls = Calls(worker)
    asked = [calls.ask(101, number, caller=1) for number in range(10)]
    await calls.told()
    sizes = [(await one).batch_prompts for one in asked]
    assert sizes == [4] * 8 + [2] * 2
    assert min([(await one).seconds for one in asked]) > 0


async def test_who_asks_for_one_waits_for_one_batch_of_who_asks_for_many(worker: Worker) -> None:
    calls = Calls(worker)
    for number in range(40):
        calls.ask(102, number, caller=1)
    await calls.told()
    await calls.ask(150, caller=2)
    assert calls.ended.index((150,)) <= 4  # the plug, and three of its own batch
    await calls.over()


async def test_whom_nobody_waits_for_any_more_leaves_before_its_turn(worker: Worker) -> None:
    calls = Calls(worker)
    asked = [calls.ask(103, number, caller=number) for number in range(8)]
    await calls.told()
    for one in asked[1:7]:
        one.cancel()
    assert [(await one).batch_prompts for one in (asked[0], asked[7])] == [2, 2]


async def test_solo_is_alone_and_goes_on_from_nothing(worker: Worker) -> None:
    calls = Calls(worker)
    shared = [calls.ask(104, number, caller=1) for number in range(3)]
    solo = calls.ask(104, 0, caller=1, is_solo=True)
    last = calls.ask(104, 4, caller=1)
    await calls.told()
    assert [(await one).batch_prompts for one in (*shared, solo, last)] == [3, 3, 3, 1, 1]
    assert (await solo).reused_tokens == 0
    assert (await solo).tensor.shape == (10, 128)
    again = calls.ask(104, 0, caller=1, length=20)
    assert (await again).reused_tokens == 8
    assert (await again).tensor.shape == (20, 128)


async def test_a_fault_is_that_of_one(worker: Worker) -> None:
    calls = Calls(worker)
    asked = [calls.ask(105, number, caller=1) for number in (1, _UNKNOWN, 2)]
    await calls.told()
    good = [await asked[0], await asked[2]]
    assert [one.tensor.shape for one in good] == [(10, 128)] * 2
    with pytest.raises(NotReady) as refusal:
        await asked[1]
    assert refusal.value.reason == "TOKENIZER_MISMATCH"
