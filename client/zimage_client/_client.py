"""The asynchronous client."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import ExitStack, aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Unpack, overload
from weakref import WeakSet

from zimage_client import _calls, training
from zimage_client._blobs import Transfers
from zimage_client._channel import Channels, Near, Way
from zimage_client._conditioning import Condition, Prompts, conditioning
from zimage_client._description import (
    Adapter,
    DitDescription,
    EncoderDescription,
    TokenCount,
    Trace,
)
from zimage_client._events import (
    Accepted,
    Completed,
    DecodedImage,
    Event,
    Generated,
    Picture,
)
from zimage_client._generation import Generation
from zimage_client._items import (
    Answers,
    Many,
    image_item,
    latents_item,
    prompt_item,
    replayed,
)
from zimage_client._options import Options, Packing, adapter_files, check_timeout, choice, spec
from zimage_client._reading import malformed
from zimage_client._replay import Replay
from zimage_client._session import EncodeSession, edit_item
from zimage_core import tracing
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import Cancelled, Unavailable
from zimage_core.formats import peft_folder
from zimage_core.tensors import TensorData
from zimage_core.tls import Credentials
from zimage_core.wire import names
from zimage_rpc.dit.v1 import dit_pb2, training_pb2

T = TypeVar("T")
M = TypeVar("M")
R = TypeVar("R")


class AsyncClient:
    """Talks to a DiT service, and to an encoder service where prompts are encoded on this side.

    Addresses are "host:port" or "unix:path", those of several replicas joined by commas. `tls`
    counts for every "host:port", while "grpc://host:port" is without and "grpcs://host:port" with
    TLS in any case. With an encoder, prompts are encoded there and sent as embeddings; without,
    they go to the DiT service as text. A token may be given as the file that it stands in. Connects
    when first used; belongs to the event loop that uses it.
    """

    def __init__(
        self, server: str = "", encoder: str = "", **credentials: Unpack[Credentials]
    ) -> None:
        self._channels = Channels(server, encoder, **credentials)
        self._streams: WeakSet[AsyncGenerator[Any, None]] = WeakSet()
        """Those that somebody may still read."""
        self._is_closed = False

    @property
    def encodes(self) -> bool:
        """Whether prompts are encoded on this side."""
        return self._channels.has_encoder

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connections and whatever runs over them."""
        self._is_closed = True
        for stream in list(self._streams):
            with suppress(RuntimeError):  # it is being read, and ends with its connection
                await stream.aclose()
        await self._channels.close()

    async def generate(self, prompt: Condition, **options: Unpack[Options]) -> Generated:
        """Makes pictures; returns when all of them are there."""
        pictures: list[Picture] = []
        accepted: Accepted | None = None
        completed: Completed | None = None
        async with aclosing(self.stream(prompt, **options)) as events:
            async for event in events:
                match event:
                    case Accepted():
                        accepted = event
                    case Picture():
                        pictures.append(event)
                    case Completed():
                        completed = event
        return _generated(pictures, accepted, completed)

    def stream(self, prompt: Condition, **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """Makes pictures and tells how it goes on; closing the generator early cancels the request.

        Use `contextlib.aclosing` around it where the loop may be left before its end.
        """
        retry = options.get("retry")
        generation = Generation(
            self._channels,
            spec(options),
            conditioning(prompt, options.get("negative")),
            adapter_files(options),
            Replay(
                timeout=options.get("timeout"),
                enabled=retry is None or retry,
                others=self._channels.dit.others,
            ),
        )
        return self._read(generation.events())

    @overload
    async def encode(
        self,
        prompt: str | Prompt,
        *,
        packing: Packing = ...,
        timeout: float | None = ...,
        retry: bool = ...,
    ) -> Embedding: ...
    @overload
    async def encode(
        self,
        prompt: Prompts,
        *,
        packing: Packing = ...,
        timeout: float | None = ...,
        retry: bool = ...,
    ) -> list[Embedding]: ...
    async def encode(
        self,
        prompt: str | Prompt | Prompts,
        *,
        packing: Packing = "shared",
        timeout: float | None = _calls.ENCODE_SECONDS,
        retry: bool = True,
    ) -> Embedding | list[Embedding]:
        """Encodes one prompt, or several in order; waits for an encoder that loads, unless `retry`
        is False. Shared with other prompts an embedding is the same to 1e-5 of its largest value;
        solo, to the last bit each time."""
        check_timeout(timeout)
        given = [prompt] if isinstance(prompt, str | Prompt) else prompt
        prompts = [Prompt(one) if isinstance(one, str) else one for one in given]
        replay = Replay(timeout=timeout, enabled=retry, others=self._channels.encoder.others)
        encoded = await self._encode(prompts, choice("packing", packing, names.PACKINGS), replay)
        return encoded[0] if given is not prompt else encoded

    def encode_session(self) -> EncodeSession:
        """One prompt while it is typed: what it begins with is encoded ahead."""

        def open_(edits: AsyncIterator[Any]) -> Answers[Embedding | TokenCount]:
            way = self._channels.encoder
            return self._each(edits, edit_item, way, _calls.encode_session, None)

        return EncodeSession(open_)

    async def count_tokens(
        self,
        prompts: Prompts,
        *,
        timeout: float | None = _calls.DESCRIBE_SECONDS,
    ) -> list[TokenCount]:
        """How many tokens prompts have, and what would become of them; encodes nothing."""
        given = [Prompt(one) if isinstance(one, str) else one for one in prompts]
        same_id = self._channels.metadata()
        return await self._channels.encoder.first(
            lambda channel: _calls.count_tokens(channel, given, timeout, same_id)
        )

    def encode_stream(
        self,
        prompts: Many[str | Prompt],
        *,
        packing: Packing = "shared",
        timeout: float | None = None,
    ) -> Answers[Embedding]:
        """Encodes any number of prompts, each for itself: yields the number of a prompt, counted
        from 0, with its embedding or its error, when that is there and in any order. Prompts are
        taken from the iterable as the encoder gets on; what was under way when a connection broke
        is sent again."""
        item = partial(prompt_item, choice("packing", packing, names.PACKINGS))
        return self._each(prompts, item, self._channels.encoder, _calls.encode_stream, timeout)

    def encode_images(
        self, files: Many[bytes], *, timeout: float | None = None
    ) -> Answers[TensorData]:
        """Turns pictures into latents, each for itself, as `encode_stream` does prompts. A picture
        is the content of a PNG, JPEG or WebP file."""
        return self._each(files, image_item, self._channels.dit, _calls.encode_images, timeout)

    def decode_latents(
        self,
        latents: Many[TensorData],
        *,
        format: Literal["png", "jpeg", "webp"] = "png",
        quality: int | None = None,
        timeout: float | None = None,
    ) -> Answers[DecodedImage]:
        """Turns latents into pictures, each for itself, as `encode_stream` does prompts."""
        item = latents_item(format, quality)
        return self._each(latents, item, self._channels.dit, _calls.decode_latents, timeout)

    async def put_blob(self, file: str | Path, *, timeout: float | None = None) -> str:
        """Sends a file to the DiT service's store, unless it is there; its SHA-256 names it from
        then on. A broken connection costs what was on its way, not what had come."""
        return await self._transfers().put(Path(file), self._lasting(timeout))

    async def get_blob(
        self, sha256: str, file: str | Path, *, timeout: float | None = None
    ) -> None:
        """Writes a blob to a file, which appears whole and verified; goes on where an earlier try
        ended, also one of another process."""
        await self._transfers().get(sha256, Path(file), self._lasting(timeout))

    async def find_blobs(
        self, digests: Iterable[str], *, timeout: float | None = _calls.DESCRIBE_SECONDS
    ) -> set[str]:
        """Those of the blobs that the DiT service has."""
        return await self._transfers().find(digests, timeout)

    async def add_adapter(
        self,
        name: str,
        file: str | Path,
        *,
        replace: bool = False,
        timeout: float | None = None,
    ) -> Adapter:
        """Gives a LoRA a name that every replica of the DiT service knows which shares its store;
        sends the file if it is not there. A name that points at another file is only moved with
        `replace`. A folder is one that peft saved."""
        near, replay, same_id = Near(), self._lasting(timeout), self._channels.metadata()
        with ExitStack() as scratch:
            whole = peft_folder.whole_file(Path(file))
            whole_file = await asyncio.to_thread(scratch.enter_context, whole)
            sha256 = await self._transfers().put(whole_file, replay, near)
        request = dit_pb2.AddAdapterRequest(name=name, sha256=sha256, replace=replace)
        while True:
            try:
                with self._channels.dit.one_try(near) as channel:
                    seconds = replay.within(_calls.ADAPTER_SECONDS)
                    return await _calls.add_adapter(channel, request, seconds, same_id)
            except Unavailable as error:  # such as while its model loads
                pause = replay.pause_after(error)
            await asyncio.sleep(pause)

    async def get_adapter(
        self, name: str, *, timeout: float | None = _calls.ADAPTER_SECONDS
    ) -> Adapter:
        """What is known of an adapter."""
        same_id = self._channels.metadata()
        return await self._channels.dit.first(
            lambda channel: _calls.get_adapter(channel, name, timeout, same_id)
        )

    async def list_adapters(
        self, *, timeout: float | None = _calls.ADAPTER_SECONDS
    ) -> list[Adapter]:
        """The adapters that have names, in the order of these."""
        same_id = self._channels.metadata()
        return await self._channels.dit.first(
            lambda channel: _calls.list_adapters(channel, timeout, same_id)
        )

    async def remove_adapter(
        self, name: str, *, timeout: float | None = _calls.ADAPTER_SECONDS
    ) -> None:
        """Takes the name of an adapter away."""
        same_id = self._channels.metadata()
        await self._channels.dit.first(
            lambda channel: _calls.remove_adapter(channel, name, timeout, same_id)
        )

    async def describe(self, *, timeout: float | None = _calls.DESCRIBE_SECONDS) -> DitDescription:
        """What the DiT service is and can do; answered while it loads, too."""
        same_id = self._channels.metadata()
        return await self._channels.dit.first(
            lambda channel: _calls.describe_dit(channel, timeout, same_id)
        )

    async def describe_encoder(
        self, *, timeout: float | None = _calls.DESCRIBE_SECONDS
    ) -> EncoderDescription:
        """What the encoder service is and can do; answered while it loads, too."""
        same_id = self._channels.metadata()
        return await self._channels.encoder.first(
            lambda channel: _calls.describe_encoder(channel, timeout, same_id)
        )

    async def trace(
        self, last_seconds: float | None = None, *, timeout: float | None = _calls.TRACE_SECONDS
    ) -> Trace:
        """What the DiT service's device did of late, or within the last seconds, and its memory.
        Answered between two steps."""
        check_timeout(last_seconds, "last_seconds")
        same_id = self._channels.metadata()
        return await self._channels.dit.first(
            lambda channel: _calls.trace(channel, last_seconds, timeout, same_id)
        )

    async def plan_training(
        self,
        request: training_pb2.PlanTrainingRequest,
        *,
        timeout: float | None = _calls.ADAPTER_SECONDS,
    ) -> training_pb2.TrainingForecast:
        """What a training would be, take and last on the DiT service. For the trainer service, as
        train_session is."""
        same_id = self._channels.metadata()
        return await self._channels.dit.first(
            lambda channel: _calls.plan_training(channel, request, timeout, same_id)
        )

    def train_session(
        self,
        opening: training_pb2.OpenTraining,
        asked: AsyncGenerator[training.Asked, None],
        file: Callable[[str], Path],
    ) -> AsyncGenerator[training.Answer, None]:
        """Trains on the DiT service, as long as nothing breaks: who feeds it opens it again. For
        the trainer service, which owns jobs; people ask that."""

        async def one_try() -> AsyncGenerator[Any, None]:
            with self._channels.dit.one_try() as channel:
                session = training.Session(opening, asked, file)
                answers = session.answers(channel, self._channels.metadata())
                async with aclosing(answers):
                    async for answer in answers:
                        yield answer

        return self._read(one_try())

    def _transfers(self) -> Transfers:
        return Transfers(self._channels.dit, self._channels.metadata())

    def _lasting(self, timeout: float | None) -> Replay:
        check_timeout(timeout)
        return Replay(timeout=timeout)  # no haste to another replica: it would begin anew

    def _each(
        self,
        items: Many[T],
        message: Callable[[int, T], M],
        way: Way,
        call: Callable[..., Answers[R]],
        timeout: float | None,
    ) -> Answers[R]:
        check_timeout(timeout)
        same_id = self._channels.metadata()

        async def one_try(messages: AsyncIterator[M], seconds: float | None) -> Answers[R]:
            with way.one_try() as channel:
                async with aclosing(call(channel, messages, seconds, same_id)) as answers:
                    async for answer in answers:
                        yield answer

        return self._read(
            replayed(items, message, one_try, Replay(timeout=timeout, others=way.others))
        )

    async def _read(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What comes of a stream. One that ends as the client is closed has not ended well."""
        self._streams.add(stream)
        async with aclosing(stream):
            async for event in stream:
                yield event
        if self._is_closed:
            raise Cancelled("the client is closed")

    async def _encode(self, prompts: list[Prompt], packing: int, replay: Replay) -> list[Embedding]:
        with tracing.within("encode") as span:
            same_id, way = self._channels.metadata(span), self._channels.encoder
            while True:
                try:
                    with way.one_try() as channel:
                        return await _calls.encode(
                            channel, prompts, packing, replay.within(None), same_id
                        )
                except Unavailable as error:
                    if error.reason != "LOADING" and not way.others:
                        raise  # gRPC has tried that again already
                    pause = replay.pause_after(error)
                await asyncio.sleep(pause)


def _generated(
    pictures: list[Picture], accepted: Accepted | None, completed: Completed | None
) -> Generated:
    if accepted is None or completed is None:
        raise malformed("it lacks its first or its last event")
    in_order = sorted(pictures, key=lambda picture: picture.index)
    return Generated(tuple(in_order), accepted, completed)
