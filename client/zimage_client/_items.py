"""The prompts of a stream: which are under way, and which are still to come."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable

from zimage_client._conditioning import prompt_message
from zimage_client._reading import malformed
from zimage_core.embeddings import Prompt
from zimage_rpc.encoder.v1 import encoder_pb2

Prompts = AsyncIterable[str | Prompt] | Iterable[str | Prompt]


class Items:
    """Over all tries of a stream, numbered from 0."""

    def __init__(self, prompts: Prompts) -> None:
        self._coming = _each(prompts)
        self._next: asyncio.Task[str | Prompt | None] | None = None
        self._under_way: dict[int, encoder_pb2.EncodeStreamRequest] = {}
        self._count = 0
        self._fault: Exception | None = None

    async def to_send(self) -> AsyncGenerator[encoder_pb2.EncodeStreamRequest, None]:
        """The messages of a try: first those that an earlier one left open."""
        for request in list(self._under_way.values()):
            yield request
        try:
            while (prompt := await self._taken()) is not None:
                given = Prompt(prompt) if isinstance(prompt, str) else prompt
                message = prompt_message(given)
                request = encoder_pb2.EncodeStreamRequest(item_id=self._count, prompt=message)
                self._under_way[self._count] = request
                self._count += 1
                yield request
        except Exception as fault:  # noqa: BLE001 - gRPC would not pass it on; `end` does
            self._fault = fault

    def done(self, number: int) -> None:
        """Strikes one off; raises InternalError for one that was not asked for."""
        if self._under_way.pop(number, None) is None:
            raise malformed(f"it answers item {number}, which was not asked for, or twice")

    def end(self) -> None:
        """Raises what kept prompts from being sent, or InternalError when answers are missing."""
        if self._fault is not None:
            raise self._fault
        if self._under_way:
            raise malformed("it ended before all prompts were answered")

    def close(self) -> None:
        """Takes no more prompts."""
        if self._next is not None:
            self._next.cancel()

    async def _taken(self) -> str | Prompt | None:
        """The next prompt. One that is awaited when a try breaks is there for the next."""
        if self._next is None:
            self._next = asyncio.ensure_future(_first(self._coming))
        prompt = await asyncio.shield(self._next)
        self._next = None
        return prompt


async def _first(prompts: AsyncIterator[str | Prompt]) -> str | Prompt | None:
    return await anext(prompts, None)


async def _each(prompts: Prompts) -> AsyncIterator[str | Prompt]:
    if isinstance(prompts, AsyncIterable):
        async for prompt in prompts:
            yield prompt
    else:
        for prompt in prompts:
            yield prompt
