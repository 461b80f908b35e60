"""Services with scripted answers, over real gRPC: what clients are tested against."""

import asyncio
import hashlib
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NoReturn

import grpc
import grpc.aio

from zimage_core.errors import ZImageError
from zimage_core.wire import status
from zimage_core.wire.limits import SERVER_OPTIONS
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

WIDTH = 4
"""Of the fake encoder's embeddings."""


class Act(Enum):
    """What a script can do besides answering and failing."""

    BREAK = auto()
    """The transport breaks: a status that no service of ours has sent."""
    HOLD = auto()
    """Nothing, until the caller gives up."""


Step = dit_pb2.GenerateResponse | ZImageError | Act


@dataclass(frozen=True)
class Addresses:
    """Where the fakes listen."""

    server: str
    encoder: str


class FakeDit(dit_pb2_grpc.DitServiceServicer):
    """Plays one script per call; without one, makes the pictures that were asked for."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self.scripts = deque(scripts)
        self.specs: list[dit_pb2.GenerateSpec] = []
        self.request_ids: list[str] = []
        self.holding = threading.Event()
        self.cancelled = threading.Event()
        self.tokens: list[str] = []
        self.descriptions: deque[dit_pb2.DescribeResponse] = deque()
        self.describe_pauses: deque[float] = deque()
        self.description = dit_pb2.DescribeResponse(
            version="0.1.0",
            ready=True,
            has_encoder=True,
            model=dit_pb2.Model(
                name="fake", variant=dit_pb2.Model.VARIANT_BASE, default_guidance_scale=2.5
            ),
        )

    async def Generate(  # noqa: N802
        self, requests: AsyncIterator[dit_pb2.GenerateRequest], context: Any
    ) -> AsyncIterator[dit_pb2.GenerateResponse]:
        request = await anext(requests)
        self.specs.append(request.spec)
        self.request_ids.append(request_id(context))
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        script = self.scripts.popleft() if self.scripts else happy(request.spec)
        try:
            for step in script:
                if isinstance(step, dit_pb2.GenerateResponse):
                    yield step
                elif step is Act.HOLD:
                    self.holding.set()
                    await asyncio.Event().wait()
                else:
                    await fail(context, step)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        context.set_trailing_metadata(((status.SERVED_BY_US, "ok"),))

    async def Describe(  # noqa: N802
        self, request: dit_pb2.DescribeRequest, context: Any
    ) -> dit_pb2.DescribeResponse:
        if self.describe_pauses:
            await asyncio.sleep(self.describe_pauses.popleft())
        return self.descriptions.popleft() if self.descriptions else self.description


class NeedyDit(FakeDit):
    """Has nothing of what a request only names, and asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.received = bytearray()
        self.has_all = asyncio.Event()

    async def Generate(  # noqa: N802
        self, requests: AsyncIterator[dit_pb2.GenerateRequest], context: Any
    ) -> AsyncIterator[dit_pb2.GenerateResponse]:
        spec = (await anext(requests)).spec
        first, *rest = happy(spec)
        tensor = spec.positive.segments[0].embedding.tensors["embeddings"]
        need = dit_pb2.Need(digests=[tensor.digest])
        for told in (first, dit_pb2.GenerateResponse(need=need)):
            assert isinstance(told, dit_pb2.GenerateResponse)
            yield told
        async for request in requests:
            self.received += request.chunk.data
        self.has_all.set()
        for told in rest:
            assert isinstance(told, dit_pb2.GenerateResponse)
            yield told
        context.set_trailing_metadata(((status.SERVED_BY_US, "ok"),))


class FakeEncoder(encoder_pb2_grpc.EncoderServiceServicer):
    """Encodes every prompt into as many rows as it has letters, or fails as the script says."""

    def __init__(self, *failures: ZImageError | Act) -> None:
        self.failures = deque(failures)
        self.prompts: list[types_pb2.Prompt] = []
        self.request_ids: list[str] = []
        self.seconds_left: list[float | None] = []

    async def Encode(  # noqa: N802
        self, request: encoder_pb2.EncodeRequest, context: Any
    ) -> encoder_pb2.EncodeResponse:
        if self.failures:
            await fail(context, self.failures.popleft())
        self.seconds_left.append(context.time_remaining())
        self.prompts.extend(request.prompts)
        self.request_ids.append(request_id(context))
        return encoder_pb2.EncodeResponse(embeddings=[embedding(p) for p in request.prompts])

    async def Describe(  # noqa: N802
        self, request: encoder_pb2.DescribeRequest, context: Any
    ) -> encoder_pb2.DescribeResponse:
        return encoder_pb2.DescribeResponse(version="0.1.0", ready=True, width=WIDTH)


def happy(spec: dit_pb2.GenerateSpec, step_count: int = 2) -> Iterator[Step]:
    """The events of a request without trouble."""
    pictures = [picture(spec, index) for index in range(spec.image_count or 1)]
    yield accepted(spec, step_count)
    for index, data in enumerate(pictures):
        for step in range(1, step_count + 1):
            yield progress(dit_pb2.Progress.STAGE_DENOISING, index, step, step_count)
        yield from pieces(index, data, seed=spec.seed + index)
    yield completed(spec, pictures)


def picture(spec: dit_pb2.GenerateSpec, index: int = 0) -> bytes:
    """The file of a picture: a pure function of the request."""
    return f"picture {index} of seed {spec.seed}: ".encode() + bytes(range(256))


def accepted(spec: dit_pb2.GenerateSpec, step_count: int = 2) -> dit_pb2.GenerateResponse:
    """The first event, unset wishes filled in."""
    effective = dit_pb2.GenerateSpec()
    effective.CopyFrom(spec)
    effective.image_count = spec.image_count or 1
    effective.step_count = spec.step_count or step_count
    effective.width_px, effective.height_px = spec.width_px or 128, spec.height_px or 128
    effective.output.format = spec.output.format or dit_pb2.Output.FORMAT_PNG
    return dit_pb2.GenerateResponse(
        accepted=dit_pb2.Accepted(spec=effective, sigmas=[1.0, 0.5, 0.0], forward_count=2)
    )


def progress(
    stage: Any, index: int = 0, step: int = 0, step_count: int = 0
) -> dit_pb2.GenerateResponse:
    """How far it is."""
    return dit_pb2.GenerateResponse(
        progress=dit_pb2.Progress(stage=stage, image_index=index, step=step, step_count=step_count)
    )


def artifact(index: int, data: bytes, seed: int) -> dit_pb2.Artifact:
    """What is said of a finished picture."""
    return dit_pb2.Artifact(
        digest=types_pb2.Digest(
            sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), media_type="image/png"
        ),
        seed=seed,
        pixels_sha256=f"pixels {index}",
    )


def pieces(index: int, data: bytes, *, seed: int = 0, sha256: str | None = None) -> Iterator[Step]:
    """A picture in two pieces; the checksum is right unless given."""
    half = len(data) // 2
    made = artifact(index, data, seed)
    made.digest.sha256 = sha256 or made.digest.sha256
    for piece in (
        dit_pb2.ArtifactChunk(image_index=index, offset=0, data=data[:half]),
        dit_pb2.ArtifactChunk(image_index=index, offset=half, data=data[half:], artifact=made),
    ):
        yield dit_pb2.GenerateResponse(artifact_chunk=piece)


def completed(spec: dit_pb2.GenerateSpec, pictures: Sequence[bytes]) -> dit_pb2.GenerateResponse:
    """The last event."""
    return dit_pb2.GenerateResponse(
        completed=dit_pb2.Completed(
            artifacts=[
                artifact(index, data, spec.seed + index) for index, data in enumerate(pictures)
            ]
        )
    )


def embedding(prompt: types_pb2.Prompt) -> types_pb2.PromptEmbedding:
    """What the fake encoder makes of a prompt."""
    rows = len(prompt.text) + 1
    data = bytes(byte % 251 for byte in range(rows * WIDTH * 2))
    bfloat16 = types_pb2.ELEMENT_TYPE_BFLOAT16
    return types_pb2.PromptEmbedding(
        tensors={
            "embeddings": types_pb2.Tensor(element_type=bfloat16, shape=[rows, WIDTH], data=data)
        },
        identity=types_pb2.EncoderIdentity(sha256="ab" * 32),
        recipe=types_pb2.EncodingRecipe(
            chat_format=1,
            hidden_layer=prompt.hidden_layer if prompt.HasField("hidden_layer") else -2,
            token_limit=512,
        ),
        numerics=types_pb2.Numerics(
            compute_type=bfloat16, weight_type=bfloat16, engine="fake", device="cpu"
        ),
        token_count=rows,
        token_ids_sha256="cd" * 32,
    )


async def fail(context: Any, what: ZImageError | Act) -> NoReturn:
    """Ends a call as a service of ours does, or as a broken connection does."""
    if isinstance(what, ZImageError):
        await context.abort(status.code_of(what), what.message, status.to_trailers(what))
    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    raise AssertionError("abort returns never")


def request_id(context: Any) -> str:
    """The id that came with a call."""
    return str(dict(context.invocation_metadata())["x-request-id"])


@asynccontextmanager
async def serving(
    dit: FakeDit | None = None, encoder: FakeEncoder | None = None
) -> AsyncIterator[Addresses]:
    """The fakes on sockets of their own, in this event loop."""
    with tempfile.TemporaryDirectory(prefix="zi-") as folder:
        addresses = Addresses(server=f"unix:{folder}/dit", encoder=f"unix:{folder}/encoder")
        async with AsyncExitStack() as closing:
            if dit is not None:
                server = grpc.aio.server(options=SERVER_OPTIONS)
                dit_pb2_grpc.add_DitServiceServicer_to_server(dit, server)
                await _started(server, addresses.server, closing)
            if encoder is not None:
                server = grpc.aio.server(options=SERVER_OPTIONS)
                encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoder, server)
                await _started(server, addresses.encoder, closing)
            yield addresses


@contextmanager
def serving_aside(
    dit: FakeDit | None = None, encoder: FakeEncoder | None = None
) -> Iterator[Addresses]:
    """The same in a thread of their own, for tests that block theirs."""
    started: Future[tuple[Addresses, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with serving(dit, encoder) as addresses:
            started.set_result((addresses, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    addresses, loop, stop = started.result()
    try:
        yield addresses
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _started(server: grpc.aio.Server, address: str, closing: AsyncExitStack) -> None:
    server.add_insecure_port(address)
    await server.start()
    closing.push_async_callback(server.stop, None)
