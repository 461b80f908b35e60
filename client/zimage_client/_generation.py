"""One request for pictures, from the first try to the last event."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import TypeVar

import grpc.aio

from zimage_client import _calls, _reading
from zimage_client._blobs import Putting
from zimage_client._channel import Channels, Metadata
from zimage_client._conditioning import Conditioning, message
from zimage_client._description import DitDescription
from zimage_client._events import Completed, Event, Progress, Waiting
from zimage_client._pictures import Assembly, Delivered
from zimage_client._replay import Replay
from zimage_core import tracing
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import DeadlineTooShort, Unavailable, ZImageError
from zimage_core.formats import peft_folder
from zimage_core.wire import request_id
from zimage_rpc.dit.v1 import dit_pb2

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Generation:
    """Sends the same request until it is answered; hands out each picture once."""

    def __init__(
        self,
        channels: Channels,
        spec: dit_pb2.GenerateSpec,
        conditioning: Conditioning,
        files: Mapping[int, Path],
        replay: Replay,
    ) -> None:
        """`spec` holds all but the conditioning, and the digests of those adapters that are
        `files`, by their places."""
        self._channels = channels
        self._request = spec
        self._named: dict[str, bytes] = {}
        """What the request only names, once it names anything."""
        self._conditioning = conditioning
        self._files = files
        self._putting: dict[str, Putting] = {}
        """The same, once it is known what they are, by their digests."""
        self._scratch = ExitStack()
        """Files that are made for the occasion."""
        self._replay = replay
        self._encoded = not channels.has_encoder
        self._delivered = Delivered()
        self._span = tracing.beneath("generate")
        self._id = request_id.current.get() or request_id.fresh()

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, until all is done; raises what another try would not mend."""
        try:
            with self._scratch:
                async with aclosing(self._tries()) as events:
                    async for event in events:
                        yield event
        except BaseException as error:
            self._span.end(error)
            raise
        self._span.end()

    async def _tries(self) -> AsyncGenerator[Event, None]:
        while True:
            try:
                async with aclosing(self._one_try()) as events:
                    async for event in events:
                        yield event
                return
            except ZImageError as error:
                pause = self._replay.pause_after(error)
                waiting = Waiting(error.reason, error.message, pause)
            _log.info("trying again in %.1f s: %s", waiting.seconds, waiting.message)
            yield waiting
            await asyncio.sleep(waiting.seconds)

    async def _one_try(self) -> AsyncGenerator[Event, None]:
        if not self._encoded:
            if isinstance(self._conditioning.positive, Prompt):
                yield Progress("encoding")
            self._conditioning = await self._conditioning.encoded(
                await self._is_guided(), self._encode
            )
            self._encoded = True
        if not self._request.HasField("positive"):
            await asyncio.to_thread(self._say_conditioning)
            await self._say_files()
        assembly, completed = Assembly(), None
        with self._channels.dit.one_try() as channel:
            async for sending in self._bring_files(channel):
                yield sending
            responses = _calls.generate(
                channel,
                self._request,
                self._named,
                self._replay.within(None),
                self._metadata(),
            )
            async with aclosing(responses):
                async for response in responses:
                    event = self._event(response, assembly)
                    if isinstance(event, Completed):
                        completed = event  # held back until the status says that this is all
                    elif event is not None:
                        yield event
        if completed is None or not self._delivered.are_all(len(completed.artifacts)):
            raise _reading.malformed("it ended before all pictures were there")
        yield completed

    def _metadata(self) -> Metadata:
        """With the token as it is now."""
        return self._channels.metadata(self._span, self._id)

    def _say_conditioning(self) -> None:
        """Once for all tries: large embeddings take a while to get their names."""
        if self._conditioning.negative is not None:
            self._request.negative.CopyFrom(message(self._conditioning.negative))
        self._named = self._conditioning.named
        self._request.positive.CopyFrom(message(self._conditioning.positive))

    async def _say_files(self) -> None:
        for at, file in self._files.items():
            whole = peft_folder.whole_file(file)
            putting = await Putting.of(await asyncio.to_thread(self._scratch.enter_context, whole))
            self._putting[putting.sha256] = putting
            self._request.adapters[at].digest.sha256 = putting.sha256

    async def _bring_files(self, channel: grpc.aio.Channel) -> AsyncGenerator[Event, None]:
        """Those that this replica lacks."""
        if not self._putting:
            return
        there = await self._soon(
            lambda seconds: _calls.find_blobs(channel, [*self._putting], seconds, self._metadata()),
            "which files it has",
        )
        for sha256 in self._putting.keys() - there:
            yield Progress("sending")
            await self._putting[sha256].once(channel, self._replay, self._metadata())

    def _event(self, response: dit_pb2.GenerateResponse, assembly: Assembly) -> Event | None:
        """A message as an event; None for a part, a repetition or what this version cannot read."""
        match response.WhichOneof("event"):
            case "accepted":
                self._replay.taken()
                return _reading.accepted(response.accepted)
            case "progress":
                event = _reading.progress(response.progress)
                if event and event.stage in ("denoising", "decoding"):
                    self._replay.worked()
                elif event and event.stage == "queued":
                    self._replay.encoded()
                return event
            case "preview":
                return _reading.preview(response.preview)
            case "artifact_chunk":
                picture = assembly.add(response.artifact_chunk)
                return picture if picture and self._delivered.is_new(picture) else None
            case "completed":
                return _reading.completed(response.completed)
            case _:
                return None

    async def _is_guided(self) -> bool:
        """Whether guidance is on, so that the negative side is needed."""
        if self._request.HasField("guidance_scale"):
            return self._request.guidance_scale > 0
        description = await self._channels.dit.first(self._described)
        if description.model is None:
            raise Unavailable("the model is being loaded", reason="LOADING")
        return description.model.default_guidance > 0

    async def _described(self, channel: grpc.aio.Channel) -> DitDescription:
        return await self._soon(
            lambda seconds: _calls.describe_dit(channel, seconds, self._metadata()), "what it is"
        )

    async def _soon(self, call: Callable[[float | None], Awaitable[T]], what: str) -> T:
        """What a short call answers. One that takes long is a fault of the service, and not of a
        caller who set no timeout."""
        most = _calls.DESCRIBE_SECONDS
        seconds = self._replay.within(most)
        try:
            return await call(seconds)
        except DeadlineTooShort as error:
            if seconds != most:
                raise
            said = f"the DiT service did not say within {most:g} s {what}"
            raise Unavailable(said, reason="UNREACHABLE") from error

    async def _encode(self, prompts: Sequence[Prompt]) -> Sequence[Embedding]:
        seconds = self._replay.within(None)  # a busy encoder is no reason to give up
        with self._channels.encoder.one_try() as channel:
            return await _calls.encode(
                channel, prompts, self._request.packing, seconds, self._metadata()
            )
