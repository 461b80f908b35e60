"""The DiT service's front with a real worker process behind it, without a model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dit_service import messages
from dit_service.rpc.adapters import Adapters
from dit_service.rpc.conditioning import Conditioner
from dit_service.rpc.generate import DitServicer
from tests.unit.test_spec import SETTINGS, TURBO
from zimage_core.embeddings import Embedding, Numerics, Recipe
from zimage_core.errors import Overloaded
from zimage_core.serving.access import Access, inside
from zimage_core.serving.blobs import BlobServicer
from zimage_core.serving.worker import Worker
from zimage_core.settings import Watchdog
from zimage_core.store.blobs import Blobs
from zimage_core.tensors import TensorData
from zimage_core.wire import embeddings
from zimage_rpc.dit.v1 import dit_pb2

EMBEDDING = Embedding(
    tensor=TensorData("bfloat16", (1, TURBO.caption_width), bytes(2 * TURBO.caption_width)),
    identity="",
    recipe=Recipe(chat_format=1, hidden_layer=-2, token_limit=512),
    numerics=Numerics("bfloat16", "bfloat16", "test", "cpu"),
    token_count=1,
    token_ids_sha256="",
)


@asynccontextmanager
async def _front(store: Path) -> AsyncIterator[DitServicer]:
    """A front that lets one request in at a time; its worker makes pictures at once."""
    ready = asyncio.Event()
    worker = Worker(
        "tests.unit.workers:pictures", TURBO, Watchdog(), lambda is_ready: is_ready and ready.set()
    )
    supervision = asyncio.create_task(worker.supervise())
    settings = SETTINGS.model_copy(update={"max_queue_length": 0})
    try:
        await ready.wait()
        blobs = Blobs(str(store), store, 1 << 20, keep_seconds=1000.0)
        conditioner = Conditioner(settings, encoder=None)
        yield DitServicer(worker, settings, conditioner, BlobServicer(blobs), Adapters(blobs))
    finally:
        supervision.cancel()
        await asyncio.gather(supervision, return_exceptions=True)


def _call(front: DitServicer) -> Any:
    segment = {"embedding": embeddings.embedding_to_wire(EMBEDDING)}
    spec = dit_pb2.GenerateSpec(
        positive={"segments": [segment]}, width_px=64, height_px=64, image_count=2
    )

    async def requests() -> AsyncIterator[dit_pb2.GenerateRequest]:
        yield dit_pb2.GenerateRequest(spec=spec)

    context: Any = _Patient()
    return aclosing(front.Generate(requests(), context))


class _Patient:
    """All of a call that is needed here."""

    def time_remaining(self) -> float | None:
        return None


async def test_a_slow_reader_keeps_nobody_out_and_gets_everything(tmp_path: Path) -> None:
    async with _front(tmp_path) as front, _call(front) as slow:
        first = await anext(slow)
        assert first.WhichOneof("event") == "accepted"
        while True:
            try:
                async with _call(front) as quick:
                    assert [answer async for answer in quick][-1].HasField("completed")
                    break
            except Overloaded:  # the slow reader's pictures are still being made
                await asyncio.sleep(0.01)
        rest = [answer async for answer in slow]
        assert [answer.sequence for answer in (first, *rest)] == list(range(1, len(rest) + 2))
        assert len(rest[-1].completed.artifacts) == 2


async def test_leaving_before_the_work_began_gives_the_place_back(tmp_path: Path) -> None:
    async with _front(tmp_path) as front:
        for _ in range(3):
            async with _call(front) as left:
                await anext(left)


async def test_work_is_done_for_the_project_of_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked_for = []
    call = Worker.call

    def noted(worker: Worker, work: messages.Generate) -> Any:
        worked_for.append(work.share.project)
        return call(worker, work)

    monkeypatch.setattr(Worker, "call", noted)
    file = tmp_path / "tokens.toml"
    entry = 'name = "{0}"\nproject = "{0}"\ntoken = "{0}0123456789abcdef"\nroles = ["admin"]\n'
    file.write_text("".join(f"[[token]]\n{entry.format(name)}" for name in ("red", "blue")))
    tokens = Access(file)
    async with _front(tmp_path) as front:
        for project in ("red", "blue"):
            bearer = {"authorization": f"Bearer {project}0123456789abcdef"}
            with inside(tokens.caller("/zimage_rpc.dit.v1.DitService/Generate", bearer)):
                async with _call(front) as answers:
                    assert [answer async for answer in answers]
    assert worked_for == ["red", "blue"]
