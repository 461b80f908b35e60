"""Who is encoded next: prompts of all callers, together as far as that is quick."""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from encoder_service.engine.prefixes import Prefixes
from encoder_service.engine.residence import Residence
from encoder_service.messages import Encode, Encoded
from encoder_service.model.qwen import Qwen3Encoder, Run, Text
from zimage_core.errors import NotReady, ZImageError
from zimage_core.planning.durations import Durations
from zimage_core.serving.child import Port, is_sticky
from zimage_core.serving.pipe import Submit
from zimage_core.settings import EncoderSettings
from zimage_core.tensors import TensorData

_log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 32
_IDLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class _Item:
    """A prompt of a batch."""

    submitted: Submit
    asked: Encode
    text: Text


class Schedule:
    """One batch after the other: a caller who sends many shares each with those who send few."""

    def __init__(
        self,
        encoder: Qwen3Encoder,
        port: Port,
        settings: EncoderSettings,
        residence: Residence | None = None,
    ) -> None:
        """With a residence, weights are on the device only while there is work."""
        self._encoder = encoder
        self._port = port
        self._residence = residence
        self._seconds_at_once = settings.max_batch_ms / 1000
        self._most_tokens = settings.max_batch_tokens
        self._prefixes = Prefixes(settings.prefix_cache_bytes)
        self._durations = Durations()
        self._seconds_per_token = 0.0
        self._lanes: OrderedDict[int, deque[Submit]] = OrderedDict()
        """Those who wait, by their callers, in the order in which these have their turns."""

    def warm_up(self) -> None:
        """Touches every weight, then measures what a prompt takes."""
        if self._residence:
            self._residence.arrive()
        text = Text([0] * _WARM_UP_TOKENS, ((self._encoder.deepest, 1.0),))
        self._encoder([text])
        began = time.monotonic()
        [run] = self._encoder([text])
        plain(run.state)
        seconds = time.monotonic() - began
        self._durations.learn(_WARM_UP_TOKENS, _WARM_UP_TOKENS, seconds)
        self._seconds_per_token = seconds / _WARM_UP_TOKENS

    def serve(self) -> NoReturn:
        """Until the process ends."""
        while True:
            if not self._lanes:
                self._take(self._awaited())
            for submitted in self._port.new_calls():
                self._take(submitted)
            if batch := self._next():
                self._run(batch)

    def _awaited(self) -> Submit:
        """The next call. Where it does not come soon, the device's memory is given back."""
        if self._residence and not self._residence.is_away:
            until = time.monotonic() + _IDLE_SECONDS
            while (left := until - time.monotonic()) > 0:
                if soon := self._port.next_call_within(left):
                    return soon
            self._prefixes.clear()
            self._residence.leave()
        return self._port.next_call()

    def _take(self, submitted: Submit) -> None:
        self._lanes.setdefault(_asked(submitted).caller, deque()).append(submitted)

    def _next(self) -> list[_Item]:
        """One prompt of each caller in turn, as long as there is room, and at least one. Those for
        whom nobody waits any more leave; whom there was no room for comes first next time."""
        batch: list[_Item] = []
        left = self._durations.units_within(self._seconds_at_once)
        room = self._most_tokens  # beginnings that ran before take memory as well
        while self._lanes:
            caller, waiting = next(iter(self._lanes.items()))
            item = None if self._port.is_cancelled(waiting[0].call) else self._item(waiting[0])
            size = len(item.asked.token_ids) if item else 0
            is_too_much = size > room or (item is not None and len(item.text.rest) > left)
            if item and batch and (item.asked.is_solo or is_too_much):
                return batch
            waiting.popleft()
            self._lanes.move_to_end(caller)
            if not waiting:
                del self._lanes[caller]
            if item:
                batch.append(item)
                left -= len(item.text.rest)
                room -= size
                if item.asked.is_solo:
                    return batch
        return batch

    def _item(self, submitted: Submit) -> _Item:
        asked = _asked(submitted)
        text = Text(asked.token_ids, asked.blend)
        if not asked.is_solo:
            text = self._prefixes.begun(text)
        return _Item(submitted, asked, text)

    def _run(self, batch: Sequence[_Item]) -> None:
        """All together; each for itself where that fails, so that a fault is that of one."""
        try:
            self._encode(batch)
        except Exception as error:
            if len(batch) == 1:
                self._port.fail(batch[0].submitted, error)
                return
            if is_sticky(error):
                raise
            if not isinstance(error, ZImageError):
                _log.warning("%s prompts together failed: %s", len(batch), error)
                self._prefixes.clear()  # it may be memory that is missing
        else:
            return
        # Behind the block: the error holds on to all that the failed run had computed.
        for item in batch:
            if not self._port.is_cancelled(item.submitted.call):
                alone = Text(item.asked.token_ids, item.asked.blend)
                self._run([replace(item, text=alone)])

    def _encode(self, batch: Sequence[_Item]) -> None:
        texts = [item.text for item in batch]
        tokens = sum(len(text.rest) for text in texts)
        self._port.announce("encode", self._seconds_per_token * tokens)
        if self._residence:
            self._residence.arrive()
        began = time.monotonic()
        calls = [item.submitted.call for item in batch]
        runs = self._encoder(texts, lambda: all(map(self._port.is_cancelled, calls)))
        states = [
            torch.cat((text.begun.state, run.state)) if text.begun else run.state
            for text, run in zip(texts, runs, strict=True)
        ]
        values = [plain(state) for state in states]
        seconds = time.monotonic() - began
        self._durations.learn(tokens, tokens, seconds)
        for item, value in zip(batch, values, strict=True):
            rest = len(item.text.rest)
            reused = len(item.asked.token_ids) - rest
            with self._port.answering(item.submitted):
                share = seconds * rest / tokens
                self._port.emit(item.submitted.call, Encoded(value, share, reused, len(batch)))
                _log.info(
                    "%s tokens, %s of them reused; a batch of %s prompts took %.3f s",
                    rest + reused,
                    reused,
                    len(batch),
                    seconds,
                )
        self._keep(texts, runs)

    def _keep(self, texts: Sequence[Text], runs: Sequence[Run]) -> None:
        """A device that has no room for it does without."""
        try:
            for text, run in zip(texts, runs, strict=True):
                if text.is_kept:
                    self._prefixes.keep(text, run)
        except torch.OutOfMemoryError as error:
            _log.warning("no room for beginnings of prompts: %s", error)
            self._prefixes.clear()


def plain(tensor: Tensor) -> TensorData:
    """The tensor as bytes, which waits for the device."""
    if not tensor.isfinite().all():
        raise NotReady(
            f"the encoder's values do not fit {type_name(tensor.dtype)}; "
            "its service should run in bfloat16 or float32",
            reason="NOT_FINITE",
        )
    data = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return TensorData(type_name(tensor.dtype), tuple(tensor.shape), data)


def type_name(dtype: torch.dtype) -> str:
    """As the wire and files know it."""
    return str(dtype).removeprefix("torch.")


def _asked(submitted: Submit) -> Encode:
    assert isinstance(submitted.payload, Encode)
    return submitted.payload
