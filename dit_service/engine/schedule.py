"""Who computes when: requests join and leave between the steps that they share."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import NoReturn

import torch

from dit_service import messages
from dit_service.engine.events import Events
from dit_service.engine.generate import Awaited, Predicted, Studio, Work
from dit_service.engine.lines import Lines, Load, Waiting
from dit_service.engine.packing import Asked
from dit_service.engine.training import Learning, Lesson, Trainings
from zimage_core.planning.shares import COMMON, Share
from zimage_core.serving.child import Port, is_sticky
from zimage_core.serving.pipe import Submit

_log = logging.getLogger(__name__)

_LEFT_AFTER_TOO_MUCH = 0.8
"""Of what a step wanted that found no memory."""
_REGAINED_IN_A_STEP = 1.001
"""What took the memory may have gone."""


@dataclass(frozen=True, slots=True)
class Room:
    """How large steps may become when several share them."""

    seconds: float
    """Whoever comes waits so long at most: a step under way is not broken off."""
    bytes: float


@dataclass(frozen=True, slots=True)
class _Live:
    """A request under way."""

    submitted: Submit
    share: Share
    is_solo: bool
    work: Work | Learning


_Together = list[tuple[_Live, Asked]]
_Wanted = tuple[_Live, Asked | Lesson]


class Schedule:
    """All live requests take turns; as many as fit, and as their shares allow, go together.
    Conversions are done between steps."""

    def __init__(self, studio: Studio, trainings: Trainings, port: Port, room: Room) -> None:
        self._studio = studio
        self._trainings = trainings
        self._port = port
        self._room = room
        self._bytes = room.bytes
        """Less for a while after a step that was too much."""
        self._conversions: deque[Submit] = deque()
        self._lines = Lines[_Wanted]()
        """Who waits for a step."""
        self._awaiting: deque[tuple[_Live, Awaited]] = deque()
        """Those who wait for something else, such as a picture that the device works on."""

    def serve(self) -> NoReturn:
        """Runs requests until the process ends."""
        while True:
            if not self._lines and not self._conversions and not self._awaiting:
                self._take(self._port.next_call())
            for submitted in self._port.new_calls():
                self._take(submitted)
            if self._conversions:  # one between two steps: streams of them keep nobody from steps
                self._convert(self._conversions.popleft())
            self._look_again()
            if together := self._next():
                self._step(together)

    def _take(self, submitted: Submit) -> None:
        match submitted.payload:
            case messages.Generate() as asked:
                work: Work | Learning = self._studio.work(asked, Events(self._port, submitted.call))
                self._go_on(_Live(submitted, asked.share, asked.is_solo, work), None)
            case messages.Learn() as asked:
                work = self._trainings.learn(asked, partial(self._port.emit, submitted.call))
                self._go_on(_Live(submitted, asked.share, True, work), None)
            case messages.Evaluate() as asked:
                work = self._trainings.evaluate(asked, partial(self._port.emit, submitted.call))
                self._go_on(_Live(submitted, asked.share, True, work), None)
            case messages.PlanTraining() as asked:
                work = self._trainings.forecast(asked, partial(self._port.emit, submitted.call))
                self._go_on(_Live(submitted, COMMON, True, work), None)
            case messages.OpenTraining() | messages.CloseTraining() as asked:
                work = self._trainings.turn_to(asked, partial(self._port.emit, submitted.call))
                self._go_on(_Live(submitted, COMMON, True, work), None)
            case messages.TakeCheckpoint() as asked:
                self._take_checkpoint(submitted, asked)
            case messages.Recall(last_seconds):
                with self._port.answering(submitted):
                    self._port.emit(submitted.call, self._studio.diary.recalled(last_seconds))
            case _:
                self._conversions.append(submitted)

    def _convert(self, submitted: Submit) -> None:
        if self._port.is_cancelled(submitted.call):
            return
        with self._port.answering(submitted):
            self._port.emit(submitted.call, self._studio.converter.convert(submitted.payload))

    def _take_checkpoint(self, submitted: Submit, asked: messages.TakeCheckpoint) -> None:
        """What is there now; it is written while others go on."""
        with self._port.working_on(submitted):
            write = self._trainings.checkpoint(asked)
            Thread(target=self._write, args=[submitted, write], name="checkpoint").start()

    def _write(self, submitted: Submit, write: Callable[[], messages.Checkpoint]) -> None:
        with self._port.answering(submitted):
            self._port.emit(submitted.call, write())

    def _look_again(self) -> None:
        """Goes on with those who have what they wait for; waits only when there is nothing else."""
        if self._awaiting and not self._lines:
            self._awaiting[0][1].wait()
        for _ in range(len(self._awaiting)):
            live, awaited = self._awaiting.popleft()
            if not self._is_wanted(live):
                self._drop(live)
            elif awaited.is_there:
                self._go_on(live, None)
            else:
                self._awaiting.append((live, awaited))

    def _next(self) -> list[_Wanted]:
        """Takes those from the lines that step next; drops those for whom nobody waits."""
        for live, _ in self._lines.drop(lambda one: not self._is_wanted(one[0])):
            self._drop(live)
        flops = self._studio.flops_within(self._room.seconds)
        return self._lines.take(Load(flops, self._bytes))

    def _step(self, together: list[_Wanted]) -> None:
        match together:
            case [(live, Lesson())]:  # it has its turn, and does the work itself
                self._go_on(live, None)
            case _:
                self._step_together(
                    [(live, asked) for live, asked in together if isinstance(asked, Asked)]
                )

    def _step_together(self, together: _Together) -> None:
        if predicted := self._predict(together):
            for (live, _), own in zip(together, predicted, strict=True):
                self._go_on(live, own)
        elif len(together) > 1:  # one of them or all together are too much
            middle = len(together) // 2
            for half in (together[:middle], together[middle:]):
                for live, _ in half:
                    if not self._is_wanted(live):
                        self._drop(live)
                if wanted := [one for one in half if self._is_wanted(one[0])]:
                    self._step_together(wanted)

    def _predict(self, together: _Together) -> list[Predicted]:
        """What came of a step; nothing when it failed, which a request alone has for its answer."""
        try:
            predicted = self._studio.predict([asked for _, asked in together])
        except Exception as error:
            if len(together) == 1:
                self._port.fail(together[0][0].submitted, error)
            elif is_sticky(error):
                raise
            else:
                self._make_smaller(together, error)
            return []  # another try comes later: the error holds the tensors of this one
        self._bytes = min(self._room.bytes, self._bytes * _REGAINED_IN_A_STEP)
        return predicted

    def _make_smaller(self, together: _Together, error: Exception) -> None:
        _log.warning("a step of %s requests failed: %s", len(together), error)
        if isinstance(error, torch.OutOfMemoryError):
            tried = sum(self._studio.load(asked).bytes for _, asked in together)
            self._bytes = min(self._bytes, _LEFT_AFTER_TOO_MUCH * tried)

    def _go_on(self, live: _Live, predicted: Predicted | None) -> None:
        """Goes on with a request until it waits for something again, or is done."""
        with self._port.working_on(live.submitted):
            try:
                awaits = live.work.send(predicted)
            except StopIteration:
                self._port.finish(live.submitted.call)
                return
            match awaits:
                case Asked():
                    load = self._studio.load(awaits)
                    left = load.flops * awaits.forwards_left / len(awaits.forwards)
                    self._wait_for_a_step(live, awaits, load, left)
                case Lesson():
                    self._wait_for_a_step(live, awaits, awaits.load, awaits.flops_left)
                case _:
                    self._awaiting.append((live, awaits))

    def _wait_for_a_step(
        self, live: _Live, wanted: Asked | Lesson, load: Load, flops_left: float
    ) -> None:
        self._lines.join(
            Waiting(
                one=(live, wanted),
                share=live.share,
                arrival=live.submitted.call,
                load=load,
                flops_left=flops_left,
                is_solo=live.is_solo,
            )
        )

    def _is_wanted(self, live: _Live) -> bool:
        return not self._port.is_cancelled(live.submitted.call)

    def _drop(self, live: _Live) -> None:
        with self._port.working_on(live.submitted):
            live.work.close()
