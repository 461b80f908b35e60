"""One prompt while it is typed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self

from zimage_client._conditioning import prompt_message
from zimage_client._description import TokenCount
from zimage_client._items import Answers
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import Cancelled, ZImageError
from zimage_rpc.encoder.v1 import encoder_pb2
from zimage_rpc.types.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class _Edit:
    """The prompt as it stands."""

    prompt: types_pb2.Prompt
    submitted: asyncio.Future[Embedding] | None = None
    """Where its embedding is waited for, if it is done."""


Open = Callable[[AsyncIterator[_Edit]], Answers[Embedding | TokenCount]]
"""Sends edits, and says what comes of each by its number."""


@dataclass(slots=True)
class _Talk:
    """One stream of edits, until it breaks for good or the session ends."""

    edits: asyncio.Queue[_Edit | None] = field(default_factory=asyncio.Queue)
    open: dict[int, _Edit] = field(default_factory=dict)
    """Those that are not answered, by their numbers."""
    count: int = 0
    task: asyncio.Task[None] | None = None

    def say(self, edit: _Edit) -> None:
        """Sends one when those before are sent."""
        self.open[self.count] = edit
        self.count += 1
        self.edits.put_nowait(edit)

    def end(self, fault: BaseException) -> None:
        """Tells all who wait."""
        for edit in self.open.values():
            if edit.submitted and not edit.submitted.done():
                edit.submitted.set_exception(fault)

    async def each(self) -> AsyncIterator[_Edit]:
        """Those that are to be sent, as they come."""
        while (edit := await self.edits.get()) is not None:
            yield edit


class EncodeSession:
    """Sends a prompt while it is typed, so that little is left to do when it is done.

    Use it as a context manager; `edit` as often as you like, `submit` for the embedding.
    """

    def __init__(self, open_: Open) -> None:
        self._open = open_
        self._talk: _Talk | None = None
        self._is_closed = False
        self.count: TokenCount | None = None
        """How long the prompt was when the service last said so."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        talk, self._talk = self._talk, None
        if talk and talk.task:
            talk.edits.put_nowait(None)
            talk.task.cancel()
            await asyncio.gather(talk.task, return_exceptions=True)
            talk.end(Cancelled("the session is closed"))  # where the task had not begun

    def edit(self, prompt: str | Prompt) -> None:
        """The prompt is this by now. Returns at once; what the service finds wrong with it is told
        when it is submitted."""
        self._say(_Edit(_message(prompt)))

    async def submit(self, prompt: str | Prompt) -> Embedding:
        """The embedding of the prompt, which is done. Others may follow."""
        submitted: asyncio.Future[Embedding] = asyncio.get_running_loop().create_future()
        self._say(_Edit(_message(prompt), submitted))
        return await submitted

    def _say(self, edit: _Edit) -> None:
        if self._is_closed:
            raise Cancelled("the session is closed")
        if self._talk is None or self._talk.task is None or self._talk.task.done():
            self._talk = _Talk()
            self._talk.task = asyncio.create_task(self._listen(self._talk))
        self._talk.say(edit)

    async def _listen(self, talk: _Talk) -> None:
        """Hands out what comes of each; what ends the stream is the answer to all that wait."""
        fault: BaseException = Cancelled("the session is closed")
        try:
            async with aclosing(self._open(talk.each())) as answers:
                async for number, result in answers:
                    self._answer(talk.open.pop(number), result)
        except ZImageError as error:
            fault = error
        finally:
            talk.end(fault)

    def _answer(self, edit: _Edit, result: Embedding | TokenCount | ZImageError) -> None:
        if isinstance(result, TokenCount):
            self.count = result
        elif edit.submitted and not edit.submitted.done():
            if isinstance(result, Embedding):
                edit.submitted.set_result(result)
            else:
                edit.submitted.set_exception(result)


def edit_item(number: int, edit: _Edit) -> encoder_pb2.EncodeSessionRequest:
    """The message of an edit."""
    return encoder_pb2.EncodeSessionRequest(
        item_id=number, prompt=edit.prompt, submit=edit.submitted is not None
    )


def _message(given: str | Prompt) -> types_pb2.Prompt:
    return prompt_message(Prompt(given) if isinstance(given, str) else given)
