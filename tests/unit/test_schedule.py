"""Requests side by side on a real small model: faults stay with whom they belong to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dit_service import messages
from zimage_core.errors import DeviceLost, InvalidRequest, Overloaded
from zimage_core.planning import schedule
from zimage_core.serving.worker import Worker
from zimage_core.settings import Watchdog
from zimage_core.tensors import TensorData

WIDTH = 128
PATIENCE_SECONDS = 40
NANS = b"\x00\x00\xc0\x7f" * 4 * WIDTH


def _request(data: bytes = bytes(4 * 4 * WIDTH), steps: int = 3) -> messages.Generate:
    return messages.Generate(
        positive=TensorData("float32", (4, WIDTH), data),
        negative=None,
        seeds=(1,),
        width_px=64,
        height_px=64,
        sigmas=schedule.sigmas(schedule.OFFICIAL, steps, 3.0),
        guidance=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        is_solo=False,
    )


@asynccontextmanager
async def _worker(
    folder: Path, more: object, entry: str = "cramped", ready: asyncio.Event | None = None
) -> AsyncIterator[Worker]:
    """On a device with memory for the steps of so many requests at once, or another."""
    ready = ready or asyncio.Event()
    worker = Worker(
        f"tests.unit.workers:{entry}",
        (folder, more),
        Watchdog(),
        lambda is_ready: ready.set() if is_ready else ready.clear(),
    )
    supervision = asyncio.create_task(worker.supervise())
    try:
        await ready.wait()
        yield worker
    finally:
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)


async def _events(worker: Worker, request: messages.Generate) -> list[object]:
    return [event async for event in worker.call(request)]


@pytest.mark.parametrize("room", [1, 9])
async def test_what_does_not_fit_together_is_done_one_by_one(model_folder: Path, room: int) -> None:
    async with _worker(model_folder, room) as worker:
        every = await asyncio.gather(*(_events(worker, _request(steps=20)) for _ in range(3)))
    pictures = {event.rgb for one in every for event in one if isinstance(event, messages.Picture)}
    assert len(pictures) == 1
    spent = [one[-1] for one in every if isinstance(one[-1], messages.Spent)]
    assert [one.step_count for one in spent] == [20, 20, 20]
    assert (max(one.occupancy for one in spent) > 20) == (room > 1)


async def test_what_fits_not_even_alone_is_an_answer(model_folder: Path) -> None:
    async with _worker(model_folder, 0) as worker:
        with pytest.raises(Overloaded) as refusal:
            await _events(worker, _request())
    assert refusal.value.reason == "DEVICE_MEMORY"


async def test_a_bad_one_harms_nobody_beside_it(model_folder: Path) -> None:
    async with _worker(model_folder, 9) as worker:
        first, bad, last = await asyncio.gather(
            _events(worker, _request(steps=20)),
            _events(worker, _request(NANS)),
            _events(worker, _request()),
            return_exceptions=True,
        )
    assert isinstance(bad, InvalidRequest)
    for one in (first, last):
        assert isinstance(one, list)
        assert isinstance(one[-1], messages.Spent)


async def test_a_lost_device_is_lost_to_all_and_replaced(
    model_folder: Path, tmp_path: Path
) -> None:
    lost, ready = str(tmp_path / "lost"), asyncio.Event()
    async with _worker(model_folder, lost, "loses_its_device_once", ready) as worker:
        both = [_events(worker, _request(steps=50)) for _ in range(2)]
        for error in await asyncio.gather(*both, return_exceptions=True):
            assert isinstance(error, DeviceLost)
        await asyncio.wait_for(ready.wait(), PATIENCE_SECONDS)
        again = await asyncio.gather(*(_events(worker, _request(steps=50)) for _ in range(2)))
    assert all(isinstance(events[-1], messages.Spent) for events in again)


async def test_others_go_on_while_a_picture_is_developed(model_folder: Path) -> None:
    async with _worker(model_folder, False, "slow_developer") as worker:
        long = asyncio.create_task(_events(worker, _request(steps=400)))
        short = await _events(worker, _request(steps=2))
        assert isinstance(short[-1], messages.Spent)
        assert not long.done()
        long.cancel()


async def test_a_picture_is_waited_for_when_there_is_nothing_else(model_folder: Path) -> None:
    async with _worker(model_folder, True, "slow_developer") as worker:
        one, other = await asyncio.gather(*(_events(worker, _request(steps=2)) for _ in range(2)))
    for events in (one, other):
        ended = [type(event) for event in events if not isinstance(event, messages.Denoised)]
        assert ended == [messages.Decoding, messages.Picture, messages.Spent]
