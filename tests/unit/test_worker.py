"""The front's side of a worker process: calls, cancelling, death, hanging, loading."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from zimage_core.errors import (
    DeviceLost,
    InternalError,
    InvalidModel,
    InvalidRequest,
    Unavailable,
)
from zimage_core.serving.worker import Worker
from zimage_core.settings import Watchdog

SHORT = Watchdog(factor=1.0, least_seconds=0.2, silence_seconds=1.0)


class _Started:
    def __init__(self, entry: str, watchdog: Watchdog) -> None:
        self._readiness: asyncio.Queue[bool] = asyncio.Queue()
        self.worker = Worker(f"tests.unit.workers:{entry}", "hello", watchdog, self._hear)

    def _hear(self, ready: bool) -> None:
        self._readiness.put_nowait(ready)

    async def becomes(self, ready: bool) -> None:
        while await self._readiness.get() is not ready:
            pass


@asynccontextmanager
async def _started(entry: str, watchdog: Watchdog | None = None) -> AsyncIterator[_Started]:
    started = _Started(entry, watchdog or Watchdog())
    supervision = asyncio.create_task(started.worker.supervise())
    try:
        yield started
    finally:
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)


async def _said(worker: Worker, word: str) -> str:
    return "".join([str(letter) async for letter in worker.call(word)])


async def test_calls_are_answered_in_order_and_side_by_side() -> None:
    async with _started("echo") as started:
        await started.becomes(True)
        assert started.worker.loaded(str) == "hello"
        answers = await asyncio.gather(*(_said(started.worker, word) for word in ("abc", "de")))
        assert answers == ["abc", "de"]


async def test_a_bad_call_harms_nobody_else() -> None:
    async with _started("echo") as started:
        await started.becomes(True)
        with pytest.raises(InvalidRequest, match="no"):
            await _said(started.worker, "refuse")
        with pytest.raises(InternalError) as stumble:
            await _said(started.worker, "stumble")
        assert "secret" not in str(stumble.value)
        assert await _said(started.worker, "ok") == "ok"


async def test_leaving_early_cancels() -> None:
    async with _started("echo") as started:
        await started.becomes(True)
        async with aclosing(started.worker.call("until cancelled")) as events:
            assert await anext(events) == "still here"
        assert await _said(started.worker, "free again") == "free again"


async def test_a_call_while_loading_is_told_to_wait() -> None:
    async with _started("echo") as started:
        with pytest.raises(Unavailable) as refusal:
            await _said(started.worker, "too early")
        assert refusal.value.reason == "LOADING"
        assert refusal.value.retry_after


async def test_a_dead_worker_is_replaced() -> None:
    async with _started("echo") as started:
        await started.becomes(True)
        with pytest.raises(DeviceLost):
            await _said(started.worker, "die")
        await started.becomes(True)
        assert await _said(started.worker, "again") == "again"


@pytest.mark.parametrize("how", ["hang", "freeze"])
async def test_a_hung_worker_is_killed_and_replaced(how: str) -> None:
    async with _started("echo", SHORT) as started:
        await started.becomes(True)
        with pytest.raises(DeviceLost):
            await _said(started.worker, how)
        await started.becomes(True)
        assert await _said(started.worker, "again") == "again"


async def test_an_idle_worker_is_left_alone() -> None:
    async with _started("echo", SHORT) as started:
        await started.becomes(True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(started.becomes(False), 2 * SHORT.silence_seconds)


async def test_a_model_that_cannot_be_ends_the_service() -> None:
    started = _Started("broken_model", Watchdog())
    with pytest.raises(InvalidModel, match="Flux"):
        await started.worker.supervise()


async def test_dying_while_loading_again_and_again_ends_the_service() -> None:
    started = _Started("dies_while_loading", Watchdog())
    with pytest.raises(InternalError, match="while loading"):
        await started.worker.supervise()
