"""Who computes when: requests join and leave between the steps that they share."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import NoReturn

from dit_service import messages
from dit_service.engine.events import Events
from dit_service.engine.generate import Predicted, Studio, Work
from dit_service.engine.packing import Asked
from zimage_core.serving.child import Port, is_sticky
from zimage_core.serving.pipe import Submit

_log = logging.getLogger(__name__)

_MOST_TOKENS_PER_STEP = 1 << 15
"""What a step packs at most: its activations are what grows with the number of requests."""


@dataclass(frozen=True, slots=True)
class _Live:
    """A request under way, with what it waits for."""

    submitted: Submit
    request: messages.Generate
    work: Work
    asked: Asked


class Schedule:
    """All live requests take turns; as many as fit share a step. Conversions are done between
    steps."""

    def __init__(self, studio: Studio, port: Port) -> None:
        self._studio = studio
        self._port = port
        self._conversions: deque[Submit] = deque()
        self._line: deque[_Live] = deque()
        """Whoever waited longest stands first."""

    def serve(self) -> NoReturn:
        """Runs requests until the process ends."""
        while True:
            if not self._line and not self._conversions:
                self._take(self._port.next_call())
            for submitted in self._port.new_calls():
                self._take(submitted)
            if self._conversions:  # one between two steps: streams of them keep nobody from steps
                self._convert(self._conversions.popleft())
            if together := self._first():
                self._step(together)

    def _take(self, submitted: Submit) -> None:
        if isinstance(submitted.payload, messages.Generate):
            self._begin(submitted, submitted.payload)
        else:
            self._conversions.append(submitted)

    def _convert(self, submitted: Submit) -> None:
        if self._port.is_cancelled(submitted.call):
            return
        with self._port.answering(submitted):
            self._port.emit(submitted.call, self._studio.converter.convert(submitted.payload))

    def _begin(self, submitted: Submit, request: messages.Generate) -> None:
        work = self._studio.work(request, Events(self._port, submitted.call))
        with self._port.working_on(submitted):
            self._line.append(_Live(submitted, request, work, next(work)))

    def _first(self) -> list[_Live]:
        """Takes those from the line that step next; drops those for whom nobody waits."""
        together: list[_Live] = []
        room = _MOST_TOKENS_PER_STEP
        while self._line:
            live = self._line[0]
            is_wanted = not self._port.is_cancelled(live.submitted.call)
            room -= self._studio.token_count(live.asked) if is_wanted else 0
            if is_wanted and together and (room < 0 or live.request.is_solo):
                break
            self._line.popleft()
            if not is_wanted:
                with self._port.working_on(live.submitted):
                    live.work.close()
                continue
            together.append(live)
            if live.request.is_solo:
                break
        return together

    def _step(self, together: list[_Live]) -> None:
        if predicted := self._predict(together):
            for live, own in zip(together, predicted, strict=True):
                self._resume(live, own)
        elif len(together) > 1:  # one of them or all together are too much
            for live in together:
                self._step([live])

    def _predict(self, together: list[_Live]) -> list[Predicted]:
        """What came of a step; nothing when it failed, which a request alone has for its answer."""
        try:
            return self._studio.predict([live.asked for live in together])
        except Exception as error:
            if len(together) == 1:
                self._port.fail(together[0].submitted, error)
            elif is_sticky(error):
                raise
            else:
                _log.warning("a step of %s requests failed: %s", len(together), error)
            return []  # another try comes later: the error holds the tensors of this one

    def _resume(self, live: _Live, predicted: Predicted) -> None:
        """Goes on with a request until it wants the model again, or is done."""
        with self._port.working_on(live.submitted):
            try:
                asked = live.work.send(predicted)
            except StopIteration:
                self._port.finish(live.submitted.call)
            else:
                self._line.append(_Live(live.submitted, live.request, live.work, asked))
