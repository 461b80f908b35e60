"""The worker process's end of the pipe: takes calls in, sends events out, dies with its front."""

import importlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from zimage_core.errors import Cancelled, InternalError, Overloaded, ZImageError
from zimage_core.serving import logs, memory, pipe
from zimage_core.settings import bound_kernel_caches, keep_compiled_code
from zimage_core.wire import request_id

_log = logging.getLogger(__name__)

_ANNOUNCE_SECONDS = 1.0


class Port:
    """What a worker's engine knows of the world outside its process."""

    def __init__(self, front: socket.socket, beat_seconds: float) -> None:
        self._front = front
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[pipe.Submit] = queue.SimpleQueue()
        self._live: set[int] = set()
        self._is_loaded = False
        self._announced: tuple[pipe.Working, float] | None = None
        threading.Thread(target=self._receive, name="pipe", daemon=True).start()
        threading.Thread(target=self._beat, args=[beat_seconds], name="beat", daemon=True).start()

    def next_call(self) -> pipe.Submit:
        """The oldest new call that is still wanted; waits for one."""
        while True:
            if submitted := self.next_call_within(None):
                return submitted

    def next_call_within(self, seconds: float | None) -> pipe.Submit | None:
        """The same, or None where none came in time, or one that is not wanted any more."""
        if self._announced is not None and self._inbox.empty():
            self._announced = None
            self._send(pipe.Idle())
        try:
            submitted = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        return None if self.is_cancelled(submitted.call) else submitted

    def new_calls(self) -> Iterator[pipe.Submit]:
        """The new calls that are there already."""
        while not self._inbox.empty():  # nobody else takes from it
            submitted = self._inbox.get()
            if not self.is_cancelled(submitted.call):
                yield submitted

    def is_cancelled(self, call: int) -> bool:
        """Whether nobody waits for this call any more."""
        return call not in self._live

    def ready(self, description: object) -> None:
        """Says that calls can be served from now on."""
        self._is_loaded = True
        self._show_life()
        self._send(pipe.Ready(description))

    def emit(self, call: int, payload: object) -> None:
        """Sends something of a call; raises Cancelled when nobody waits for it any more."""
        self.refuse_cancelled(call)
        self._send(pipe.Event(call, payload))

    def refuse_cancelled(self, call: int) -> None:
        """Raises Cancelled when nobody waits for this call any more."""
        if self.is_cancelled(call):
            raise Cancelled("the call was cancelled")

    def finish(self, call: int, error: ZImageError | None = None) -> None:
        """Ends a call; nothing of it may be sent afterwards."""
        self._live.discard(call)
        self._send(pipe.Finished(call, error))

    def load_failed(self, error: ZImageError) -> None:
        """Says that this model cannot be served, now or later."""
        self._send(pipe.LoadFailed(error))

    def announce(self, what: str, expected_seconds: float) -> None:
        """Tells the watchdog what begins now; it holds until the next piece of work, or none.

        A small step like the last one is not worth a message: each wakes the front, on a CPU at the
        cost of the work.
        """
        now = time.monotonic()
        last, said = self._announced or (None, 0.0)
        work = pipe.Working(what, expected_seconds)
        if (
            last is None
            or last.what != what
            or last.expected_seconds < expected_seconds
            or now - said > _ANNOUNCE_SECONDS
        ):
            self._announced = (work, now)
            self._send(work)

    @contextmanager
    def answering(self, submitted: pipe.Submit) -> Iterator[None]:
        """Ends the call as the block ends, in one way or another."""
        with self.working_on(submitted):
            yield
            self.finish(submitted.call)

    @contextmanager
    def working_on(self, submitted: pipe.Submit) -> Iterator[None]:
        """A piece of a call's work. A fault of the call is its answer and no more; a fault of the
        device leaves the block and ends this process."""
        context = request_id.current.set(submitted.request_id)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again where it is not the call's
            self.fail(submitted, error)
        finally:
            request_id.current.reset(context)

    def fail(self, submitted: pipe.Submit, error: Exception) -> None:
        """Ends a call with the answer to a fault of it; raises a fault of the device."""
        if is_sticky(error):
            raise error
        if not isinstance(error, ZImageError):
            _log.error("call failed", exc_info=error)
            error = _answer(error, submitted.request_id)
        self.finish(submitted.call, error)

    def _send(self, message: object) -> None:
        packed = pipe.packed(message)
        with self._sending:
            self._front.sendall(packed)

    def _receive(self) -> None:
        """Listens to the front; when it is gone, so is this process, whatever it is doing."""
        try:
            with self._front.makefile("rb") as stream:
                while message := pipe.read(stream):
                    match message:
                        case pipe.Cancel():
                            self._live.discard(message.call)
                        case pipe.Submit():
                            self._live.add(message.call)
                            self._inbox.put(message)
            os._exit(0)
        except Exception:  # noqa: BLE001 - deaf but alive, this process would be waited for
            _log.exception("cannot understand the front")
            os._exit(1)

    def _beat(self, seconds: float) -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            self._show_life()

    def _show_life(self) -> None:
        held: dict[str, int] = {}
        if self._is_loaded:  # half-imported libraries know nothing of their memory
            try:
                held = memory.held()
            except Exception:  # noqa: BLE001 - it is alive, whatever cannot be counted
                _log.debug("memory cannot be counted", exc_info=True)
        self._send(pipe.Alive(held))


def is_sticky(error: BaseException) -> bool:
    """Whether the device is lost to this process. Known by name: this room imports no torch."""
    return "AcceleratorError" in _class_names(error)


def _answer(error: Exception, request: str) -> ZImageError:
    if "OutOfMemoryError" in _class_names(error):
        return Overloaded(
            "the device's memory cannot hold this request; ask for less at once",
            reason="DEVICE_MEMORY",
        )
    return InternalError("internal error", fields={"request_id": request})


def _class_names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def run(front: socket.socket, entry: str, settings: object, beat_seconds: float) -> None:
    """The process's first function; `entry` is resolved here: the front never imports it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the front drains first, then hangs up
    bound_kernel_caches()
    keep_compiled_code()
    logs.configure()
    port = Port(front, beat_seconds)
    module, _, function = entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(port, settings)
    except ZImageError as error:
        port.load_failed(error)
    except Exception:  # noqa: BLE001 - whatever it was, this process cannot go on
        _log.exception("worker failed")
        os._exit(1)
