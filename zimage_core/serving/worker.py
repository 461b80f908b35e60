"""The front's end of the pipe: starts the worker process, hands it calls, replaces it when it dies
or hangs. The front never does the work itself and never imports what does it."""

import asyncio
import itertools
import logging
import multiprocessing
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import TypeVar

from zimage_core.errors import DeviceLost, InternalError, Unavailable
from zimage_core.serving import child, metrics, pipe
from zimage_core.settings import Watchdog
from zimage_core.wire import request_id
from zimage_rpc.types.v1 import types_pb2

_log = logging.getLogger(__name__)

_RETRY_AFTER_SECONDS = 1.0
_CRASHES_WHILE_LOADING = 3
_REAPING_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 30.0
_DOUBT_SECONDS = 0.05
_READ_AHEAD_BYTES = 1 << 20

T = TypeVar("T")


class Worker:
    """One worker process and its successors."""

    def __init__(
        self, entry: str, settings: object, watchdog: Watchdog, on_ready: Callable[[bool], None]
    ) -> None:
        """`entry` is "module:function", resolved in the child; `on_ready` hears of every change."""
        self._entry = entry
        self._settings = settings
        self._watchdog = watchdog
        self._on_ready = on_ready
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Queue[pipe.Event | pipe.Finished]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._work: pipe.Working | None = None
        self._work_began = 0.0
        self._lives = 0
        self._load_seconds = 0.0
        self._memory: Mapping[str, int] = {}
        metrics.WORKER_CALLS.set_function(lambda: len(self._calls))
        self.description: object | None = None
        """What the worker said of itself when it was ready; None until then."""

    async def supervise(self) -> None:
        """Keeps a worker running until cancelled; raises the error that makes it pointless."""
        crashes, pause = 0, 0.0
        while True:
            await asyncio.sleep(pause)
            was_ready = await self._live_once()
            crashes = 0 if was_ready else crashes + 1
            pause = min(2 * pause + 0.1, _LONGEST_PAUSE_SECONDS) if crashes else 0.0
            if crashes == _CRASHES_WHILE_LOADING:
                raise InternalError(f"the worker died {crashes} times while loading; see the log")

    def loaded(self, kind: type[T]) -> T:
        """What the worker said of itself when it was ready; raises Unavailable while it loads."""
        if self.description is None:
            raise Unavailable(
                "the model is being loaded", reason="LOADING", retry_after=_RETRY_AFTER_SECONDS
            )
        assert isinstance(self.description, kind)
        return self.description

    @property
    def state(self) -> types_pb2.Worker:
        """What the worker does, as Describe tells it."""
        states = types_pb2.Worker
        is_loading = self.description is None
        doing = states.STATE_WORKING if self._work else states.STATE_IDLE
        return types_pb2.Worker(
            state=states.STATE_LOADING if is_loading else doing,
            work=self._work.what if self._work else "",
            call_count=len(self._calls),
            restart_count=max(0, self._lives - 1),
            load_seconds=0.0 if is_loading else self._load_seconds,
            memory_bytes=self._memory,
        )

    async def call(self, payload: object) -> AsyncGenerator[object, None]:
        """The events of one call until it is done; raises its error. Closing it early cancels."""
        self.loaded(object)
        number, events = next(self._numbers), asyncio.Queue[pipe.Event | pipe.Finished]()
        self._calls[number] = events
        self._post(pipe.Submit(number, payload, request_id.current.get()))
        try:
            while isinstance(event := await events.get(), pipe.Event):
                yield event.payload
            if event.error is not None:
                raise event.error
        finally:
            if self._calls.pop(number, None) is not None:
                self._post(pipe.Cancel(number))

    async def _live_once(self) -> bool:
        """One process from start to death; whether it was ever ready."""
        self._lives += 1
        metrics.WORKER_STARTS.inc()
        ours, theirs = socket.socketpair()
        arguments = (theirs, self._entry, self._settings, self._watchdog.silence_seconds / 8)
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=child.run, args=arguments, name="worker", daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()  # or its death would not be heard
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_READ_AHEAD_BYTES)
        try:
            await self._listen(reader, process)
            return self.description is not None
        finally:
            self.description = None  # from here on, no call gets in
            self._on_ready(False)
            self._fail_calls()  # now: a driver that hangs may keep the process for long
            process.kill()
            self._writer.close()
            await asyncio.shield(asyncio.to_thread(process.join, _REAPING_SECONDS))

    async def _listen(self, reader: asyncio.StreamReader, process: BaseProcess) -> None:
        """Hands out what the worker says, until it falls silent for good."""
        self._work = None
        work_ends, began = float("inf"), time.monotonic()
        self._memory = {}
        metrics.WORKER_MEMORY.clear()
        while True:
            patience = min(self._watchdog.silence_seconds, work_ends - time.monotonic())
            try:
                message = await _heard(reader, patience)
            except TimeoutError:
                what = self._work.what if self._work else "idle"
                _log.error("worker %s hung (%s); killing it", process.pid, what)
                return
            match message:
                case None:
                    await asyncio.to_thread(process.join, 1)
                    _log.error("worker %s died with exit code %s", process.pid, process.exitcode)
                    return
                case pipe.Alive(memory):
                    self._memory = memory
                    metrics.enter_memory(memory)
                case pipe.Event() | pipe.Finished():
                    self._deliver(message)
                case pipe.Working(_, expected):
                    self._turn_to(message)
                    allowed = max(self._watchdog.least_seconds, self._watchdog.factor * expected)
                    work_ends = time.monotonic() + allowed
                case pipe.Idle():
                    self._turn_to(None)
                    work_ends = float("inf")
                case pipe.Ready(description):
                    self.description = description
                    self._load_seconds = time.monotonic() - began
                    self._on_ready(True)
                case pipe.LoadFailed(error):
                    raise error

    def _turn_to(self, work: pipe.Working | None) -> None:
        now = time.monotonic()
        if self._work:
            metrics.WORKER_SECONDS.labels(self._work.what).inc(now - self._work_began)
        self._work, self._work_began = work, now

    def _fail_calls(self) -> None:
        lost = DeviceLost("the worker that had this request died", retry_after=_RETRY_AFTER_SECONDS)
        for number, events in self._calls.items():
            events.put_nowait(pipe.Finished(number, lost))

    def _deliver(self, message: pipe.Event | pipe.Finished) -> None:
        events = self._calls.get(message.call)
        if events is not None:  # else nobody waits for it any more
            events.put_nowait(message)
        if isinstance(message, pipe.Finished):
            self._calls.pop(message.call, None)

    def _post(self, message: object) -> None:
        """Sends without waiting, in order; that nobody is there shows at the reading end."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pipe.packed(message))


async def _heard(reader: asyncio.StreamReader, patience: float) -> object | None:
    """The worker's next message, None when it is gone; raises TimeoutError when it is silent."""
    hearing = asyncio.create_task(pipe.receive(reader))
    try:
        # The second wait is for a front that was stopped itself: what it missed is there at once.
        for seconds in (max(patience, 0.0), _DOUBT_SECONDS):
            await asyncio.wait({hearing}, timeout=seconds)
            if hearing.done():
                return hearing.result()
        raise TimeoutError
    finally:
        hearing.cancel()
