"""A service's life from start to exit, the same for every service.

Bound before the model loads, so that probes, Describe and early callers get an answer; NOT_SERVING
until the worker is loaded and warm; on SIGTERM first NOT_SERVING, then a pause for balancers to
notice, then no new calls, then the running ones to their end.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from zimage_core.errors import InvalidSettings
from zimage_core.serving import metrics, probes
from zimage_core.serving.access import Access
from zimage_core.serving.interceptors import Around
from zimage_core.serving.readiness import Readiness
from zimage_core.serving.tls import server_credentials
from zimage_core.settings import ServiceSettings
from zimage_core.tls import Tls
from zimage_core.wire.addresses import is_loopback
from zimage_core.wire.limits import SERVER_OPTIONS

_log = logging.getLogger(__name__)


OnReady = Callable[[bool], None]
"""Hears whether calls can be served, of every change."""

Beside = Callable[[], Coroutine[Any, Any, None]]
"""What a service does beside its calls."""


@dataclass(frozen=True, slots=True)
class Service:
    """What makes one service differ from another."""

    name: str
    """The full name of its gRPC service."""
    register: Callable[[grpc.aio.Server, OnReady], Beside]
    """Adds the servicer, and returns what runs beside it as long as calls are served: that says
    whether they can be, and raises what makes serving pointless."""
    also: Sequence[str] = ()
    """The full names of services that it has beside its own."""
    leave: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Brings what it does beside its calls to a good end, before it stops."""
    neighbours: Sequence[AbstractAsyncContextManager[object]] = ()
    """Clients of other services, closed when this one ends."""


async def serve(service: Service, settings: ServiceSettings) -> None:
    """Runs until SIGTERM or Ctrl-C; raises what makes serving pointless, such as a broken model."""
    _refuse_open_address(settings)
    tokens = Access(settings.tokens) if settings.tokens else None
    around = Around(tokens)
    server = grpc.aio.server(interceptors=[around], options=_options(settings))
    readiness = Readiness(service.name)
    beside = service.register(server, readiness.set)
    health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, server)
    names = (
        service.name,
        *service.also,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    )
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)

    async with contextlib.AsyncExitStack() as closing:
        for neighbour in service.neighbours:
            await closing.enter_async_context(neighbour)
        if settings.probes:
            at = await closing.enter_async_context(
                await probes.start(settings.probes, lambda: readiness.is_ready)
            )
            _log.info("probes on %s:%s", *at.sockets[0].getsockname()[:2])
        port = _bind(server, settings.listen, settings.own_tls)
        await server.start()
        _settle_memory()
        how = _protection(settings)
        _log.info("%s listens on %s, %s", service.name, _spoken(settings.listen, port), how)
        loop = asyncio.get_running_loop()
        metrics.TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
        supervision = asyncio.create_task(beside())
        try:
            with _stop_signals() as stop:
                if settings.exit_with_stdin:
                    _stop_at_end_of_input(stop)
                await _first(supervision, stop)
            await readiness.drain()
            if not supervision.done():
                _log.info("draining")
                await asyncio.sleep(settings.drain_delay_seconds)
                await _leave(service, settings.grace_seconds)
            await _end_calls(server, around, readiness, settings.grace_seconds)
        finally:
            supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervision  # raises what ended it, if it ended by itself
    _log.info("stopped")


async def _leave(service: Service, seconds: float) -> None:
    if service.leave:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.leave(), seconds)


async def _end_calls(
    server: grpc.aio.Server, around: Around, readiness: Readiness, grace_seconds: float
) -> None:
    """Lets no new ones in, and the running ones come to their end."""
    readiness.end_watches()
    around.stop()
    await server.stop(grace_seconds)


def _settle_memory() -> None:
    """What was imported stays. Python looks for garbage when a quarter as much was made anew as the
    last time it looked: now that is what calls leave behind, and not all that was imported."""
    gc.collect()
    gc.freeze()
    gc.collect()


def _options(settings: ServiceSettings) -> list[tuple[str, int]]:
    """How long the calls of an old connection may take stays unlimited, as gRPC has it."""
    age = settings.connection_age_seconds
    more = [] if age is None else [("grpc.max_connection_age_ms", round(age * 1000))]
    return [*SERVER_OPTIONS, *more]


def _bind(server: grpc.aio.Server, address: str, own: Tls | None) -> int:
    if _is_served(address):  # gRPC would take the path away from whoever serves there
        raise _cannot_listen(address, "another process serves there")
    try:
        if own is None or address.startswith("unix:"):
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(own))
    except RuntimeError as error:
        what = "the address is taken, not of this machine or not allowed"
        raise _cannot_listen(address, what) from error


def _is_served(address: str) -> bool:
    """Whether somebody listens at a path; one left behind by the dead is free."""
    if not address.startswith("unix:"):
        return False
    with socket.socket(socket.AF_UNIX) as caller:
        try:
            return caller.connect_ex(address.removeprefix("unix:").removeprefix("//")) == 0
        except OSError as error:  # such as a path that is too long for any socket
            raise _cannot_listen(address, str(error)) from error


def _cannot_listen(address: str, what: str) -> InvalidSettings:
    return InvalidSettings(
        f"cannot listen on {address}: {what}",
        reason="CANNOT_LISTEN",
        fields={"field": "listen", "given": address},
    )


def _spoken(address: str, port: int) -> str:
    """The address with the port that was taken where any would do."""
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _protection(settings: ServiceSettings) -> str:
    if settings.listen.startswith("unix:"):
        return "for whoever may open the socket"
    own = settings.own_tls
    return "without TLS" if own is None else "with mutual TLS" if own.ca else "with TLS"


def _refuse_open_address(settings: ServiceSettings) -> None:
    """Only this machine may reach a service without TLS, unless somebody said otherwise."""
    address = settings.listen
    if address.startswith("unix:") or settings.insecure or settings.own_tls:
        return
    if is_loopback(address.rpartition(":")[0]):
        return
    raise InvalidSettings(
        f"listen {address}: anyone on the network could use this service; give --tls-cert and "
        "--tls-key (`zimage-client certs` makes them), listen on 127.0.0.1 or a unix: socket, or "
        "say --insecure where the network is trusted",
        reason="OPEN_ADDRESS",
        fields={"field": "listen", "given": address},
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and Ctrl-C set; the second signal ends the process as usual."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: object) -> None:
        signal.signal(number, usual[signal.Signals(number)])
        loop.call_soon_threadsafe(stop.set)

    for number in usual:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    """Sets the event when standard input ends: whoever started this service is gone."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        with contextlib.suppress(OSError):  # there is no standard input: that is its end, too
            while os.read(0, 1024):  # not sys.stdin, whose lock would trouble the exit
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: it stops already
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


async def _first(supervision: asyncio.Task[None], stop: asyncio.Event) -> None:
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({supervision, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
