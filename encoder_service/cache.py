"""What was encoded, kept by all that decides it; what several want at a time is made once."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from encoder_service.prompt import TokenIds
from zimage_core.embeddings import Blend, Numerics
from zimage_core.serving import metrics
from zimage_core.tensors import TensorData

Make = Callable[[], Coroutine[Any, Any, TensorData]]


@dataclass(frozen=True, slots=True)
class Key:
    """All that decides an embedding, as it is before a long one is made to fit."""

    identity: str
    blend: Blend
    numerics: Numerics
    token_ids: TokenIds
    is_solo: bool
    """Whether it was encoded alone; if so, it serves those as well who did not insist."""


@dataclass(slots=True)
class _Making:
    """Something that is being made, and for how many."""

    key: Key
    task: asyncio.Task[TensorData] = field(init=False)
    waiting: int = 0


class Cache:
    """So many bytes of embeddings, those that were wanted last."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Key, TensorData] = OrderedDict()
        self._making: dict[Key, _Making] = {}
        self.bytes = 0
        """Of those that are kept."""
        metrics.ENCODER_CACHE_BYTES.set_function(lambda: self.bytes)

    def __contains__(self, key: Key) -> bool:
        """Whether it can be had at once."""
        return any(one in self._kept for one in _serving(key))

    def drop(self, key: Key) -> None:
        """Lets go of something that nobody will want."""
        if tensor := self._kept.pop(key, None):
            self.bytes -= len(tensor.data)

    async def of(self, key: Key, make: Make) -> TensorData:
        """What is kept, or comes of what somebody makes, or is made now: in a task of its own, that
        ends early when nobody waits for it any more. A failure is that of all who waited, and is
        not kept."""
        for one in _serving(key):
            if one in self._kept:
                metrics.ENCODER_CACHE.labels("hit").inc()
                self._kept.move_to_end(one)
                return self._kept[one]
        making = next((self._making[one] for one in _serving(key) if one in self._making), None)
        metrics.ENCODER_CACHE.labels("joined" if making else "miss").inc()
        if making is None:
            making = self._making[key] = _Making(key)
            making.task = asyncio.create_task(self._made(making, make))
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting and not making.task.done():
                self._forget(making)
                making.task.cancel()

    async def _made(self, making: _Making, make: Make) -> TensorData:
        try:
            tensor = await make()
        finally:
            self._forget(making)
        self._keep(making.key, tensor)
        return tensor

    def _forget(self, making: _Making) -> None:
        """It is not being made any more, unless somebody has begun again."""
        if self._making.get(making.key) is making:
            del self._making[making.key]

    def _keep(self, key: Key, tensor: TensorData) -> None:
        size = len(tensor.data)
        if size > self._most_bytes:
            return
        if key not in self._kept:
            self.bytes += size
        self._kept[key] = tensor
        self._kept.move_to_end(key)
        while self.bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= len(oldest.data)


def _serving(key: Key) -> tuple[Key, Key]:
    """What is as good as what is asked for."""
    return key, replace(key, is_solo=True)
