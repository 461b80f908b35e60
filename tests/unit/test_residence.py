"""Weights that are on the device only while there is work."""

import asyncio
from pathlib import Path

import pytest
import torch

from encoder_service.engine.residence import Residence
from encoder_service.messages import Encode, Encoded
from encoder_service.model.loading import load
from encoder_service.model.narrow import FULL, INT4, INT8
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.serving.worker import Worker
from zimage_core.settings import EncoderSettings, Watchdog

HOST, DEVICE = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("form", [FULL, INT8, INT4])
def test_all_of_them_come_and_go(
    model_folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forms that a device other than a CPU has them in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    encoder = load(EncoderFiles.of(model_folder), -2, "cuda", "float32", form, is_resident=False)
    before = {name: value.clone() for name, value in encoder.named_parameters()}
    tensors = [*encoder.parameters(), *encoder.buffers()]
    assert {tensor.device for tensor in tensors} == {HOST}
    residence = Residence(encoder, DEVICE)
    residence.arrive()
    there = [*encoder.parameters(), *encoder.buffers()]
    assert len(there) == len(tensors)
    assert {tensor.device for tensor in there} == {DEVICE}
    loose = [
        (name, value)
        for name, module in encoder.named_modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
    ]
    assert not loose, "left behind"
    residence.leave()
    assert all(
        one is other
        for one, other in zip([*encoder.parameters(), *encoder.buffers()], tensors, strict=True)
    )
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_parameters())


async def test_they_leave_when_nobody_asks_and_come_for_the_next(model_folder: Path) -> None:
    """Beginnings of prompts leave with them: what is run anew was away."""
    ready = asyncio.Event()
    settings = EncoderSettings(model=model_folder, dtype="float32")
    entry = "tests.unit.workers:offloaded_encoder"
    worker = Worker(entry, settings, Watchdog(), lambda _is_ready: ready.set())
    supervision = asyncio.create_task(worker.supervise())

    async def reused() -> int:
        call = worker.call(Encode((*range(20),), ((-2, 1.0),), caller=1, is_solo=False))
        [encoded] = [event async for event in call]
        assert isinstance(encoded, Encoded)
        return encoded.reused_tokens

    try:
        async with asyncio.timeout(60):
            await ready.wait()
            assert await reused() == 0
            assert await reused() == 16
            await asyncio.sleep(3)
            assert await reused() == 0
            assert await reused() == 16
    finally:
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)
