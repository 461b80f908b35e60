"""The asynchronous client."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self, Unpack, overload

from zimage_client import _calls
from zimage_client._channel import Channels, metadata
from zimage_client._conditioning import Condition, Prompts, conditioning
from zimage_client._description import DitDescription, EncoderDescription
from zimage_client._events import Accepted, Completed, Event, Generated, Picture
from zimage_client._generation import Generation
from zimage_client._items import Items
from zimage_client._items import Prompts as StreamPrompts
from zimage_client._options import Options, check_timeout, spec
from zimage_client._reading import malformed
from zimage_client._replay import Replay
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import Unavailable, ZImageError


class AsyncClient:
    """Talks to a DiT service, and to an encoder service where prompts are encoded on this side.

    Addresses are "host:port" or "unix:path". With an encoder, prompts are encoded there and sent as
    embeddings; without, they go to the DiT service as text. Connects when first used; belongs to
    the event loop that uses it.
    """

    def __init__(self, server: str = "", encoder: str = "") -> None:
        self._channels = Channels(server, encoder)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connections and whatever runs over them."""
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
        return Generation(
            self._channels,
            spec(options),
            conditioning(prompt, options.get("negative")),
            Replay(timeout=options.get("timeout"), enabled=retry is None or retry),
        ).events()

    @overload
    async def encode(
        self, prompt: str | Prompt, *, timeout: float | None = ..., retry: bool = ...
    ) -> Embedding: ...
    @overload
    async def encode(
        self, prompt: Prompts, *, timeout: float | None = ..., retry: bool = ...
    ) -> list[Embedding]: ...
    async def encode(
        self,
        prompt: str | Prompt | Prompts,
        *,
        timeout: float | None = _calls.ENCODE_SECONDS,
        retry: bool = True,
    ) -> Embedding | list[Embedding]:
        """Encodes one prompt, or several together, in order; waits for an encoder that loads,
        unless `retry` is False."""
        check_timeout(timeout)
        given = [prompt] if isinstance(prompt, str | Prompt) else prompt
        prompts = [Prompt(one) if isinstance(one, str) else one for one in given]
        encoded = await self._encode(prompts, Replay(timeout=timeout, enabled=retry))
        return encoded[0] if given is not prompt else encoded

    async def encode_stream(
        self, prompts: StreamPrompts, *, timeout: float | None = None
    ) -> AsyncGenerator[tuple[int, Embedding | ZImageError], None]:
        """Encodes any number of prompts, each for itself: yields the number of a prompt, counted
        from 0, with its embedding or its error, when that is there and in any order. Prompts are
        taken from the iterable as the encoder gets on; what was under way when a connection broke
        is sent again."""
        check_timeout(timeout)
        replay, same_id, items = Replay(timeout=timeout), metadata(), Items(prompts)
        try:
            while True:
                answers = _calls.encode_stream(
                    self._channels.encoder(), items.to_send(), replay.within(None), same_id
                )
                try:
                    async with aclosing(answers):
                        async for number, result in answers:
                            replay.worked()
                            items.done(number)
                            yield number, result
                    items.end()
                    return
                except Unavailable as error:
                    pause = replay.pause_after(error)
                await asyncio.sleep(pause)
        finally:
            items.close()

    async def describe(self, *, timeout: float | None = _calls.DESCRIBE_SECONDS) -> DitDescription:
        """What the DiT service is and can do; answered while it loads, too."""
        return await _calls.describe_dit(self._channels.dit(), timeout, metadata())

    async def describe_encoder(
        self, *, timeout: float | None = _calls.DESCRIBE_SECONDS
    ) -> EncoderDescription:
        """What the encoder service is and can do; answered while it loads, too."""
        return await _calls.describe_encoder(self._channels.encoder(), timeout, metadata())

    async def _encode(self, prompts: list[Prompt], replay: Replay) -> list[Embedding]:
        same_id = metadata()
        while True:
            channel = self._channels.encoder()  # not before: it may be closed meanwhile
            try:
                return await _calls.encode(channel, prompts, replay.within(None), same_id)
            except Unavailable as error:
                if error.reason != "LOADING":
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
