"""The front's end of the pipe: starts the worker process, hands it calls, replaces it when it dies
or hangs. The front never does the work itself and never imports what does it."""

import asyncio
import itertools
import logging
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from zimage_core.errors import DeviceLost, InternalError, Unavailable
from zimage_core.serving import child, pipe
from zimage_core.settings import Watchdog
from zimage_core.wire import request_id

_log = logging.getLogger(__name__)


_RETRY_AFTER_SECONDS = 1.0
_CRASHES_WHILE_LOADING = 3
_REAPING_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 30.0

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
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="pipe-out")
        self._connection: Connection | None = None
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
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, self._entry, self._settings, self._watchdog.silence_seconds / 8)
        process = spawn.Process(target=child.run, args=arguments, name="worker", daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()  # or the pipe would never end
        inbox = _Inbox(self._connection)
        try:
            await self._listen(inbox, process)
            return self.description is not None
        finally:
            self.description = None  # from here on, no call gets in
            self._on_ready(False)
            self._fail_calls()  # now: a driver that hangs may keep the process for long
            process.kill()
            await asyncio.shield(asyncio.to_thread(process.join, _REAPING_SECONDS))
            self._connection.close()  # not before: a thread may be reading it

    async def _listen(self, inbox: "_Inbox", process: BaseProcess) -> None:
        """Hands out what the worker says, until it falls silent for good."""
        work: pipe.Working | None = None
        work_ends = float("inf")
        while True:
            patience = min(self._watchdog.silence_seconds, work_ends - time.monotonic())
            try:
                message = await inbox.get(patience)
            except TimeoutError:
                what = work.what if work else "idle"
                _log.error("worker %s hung (%s); killing it", process.pid, what)
                return
            match message:
                case None:
                    await asyncio.to_thread(process.join, 1)
                    _log.error("worker %s died with exit code %s", process.pid, process.exitcode)
                    return
                case pipe.Event() | pipe.Finished():
                    self._deliver(message)
                case pipe.Working(_, expected):
                    work = message
                    allowed = max(self._watchdog.least_seconds, self._watchdog.factor * expected)
                    work_ends = time.monotonic() + allowed
                case pipe.Idle():
                    work, work_ends = None, float("inf")
                case pipe.Ready(description):
                    self.description = description
                    self._on_ready(True)
                case pipe.LoadFailed(error):
                    raise error

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
        """Sends in the background, in order; a broken pipe shows at the reading end."""
        if self._connection is not None:
            self._sender.submit(_send, self._connection, message)


class _Inbox:
    """Brings what a thread reads from the pipe into the event loop; None is its end."""

    def __init__(self, connection: Connection) -> None:
        self._messages: asyncio.Queue[object | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def read() -> None:
            message: object | None = ...
            while message is not None:
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    message = None
                try:
                    loop.call_soon_threadsafe(self._messages.put_nowait, message)
                except RuntimeError:  # the loop is closed: the service is going down
                    return

        threading.Thread(target=read, name="pipe-in", daemon=True).start()

    async def get(self, patience: float) -> object | None:
        """The next message; raises TimeoutError only when there really is none."""
        if not self._messages.empty():  # a front that was stopped for a while has some waiting
            return self._messages.get_nowait()
        return await asyncio.wait_for(self._messages.get(), max(patience, 0.001))


def _send(connection: Connection, message: object) -> None:
    try:
        connection.send(message)
    except OSError:
        _log.debug("the worker is gone; %s not sent", type(message).__name__)
    except Exception:  # noqa: BLE001 - a payload that cannot be pickled is a fault of ours
        _log.exception("cannot send %s", type(message).__name__)
