"""Whether calls can be served, told to gRPC's health service and to the HTTP probes."""

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2

from zimage_core.serving import metrics

_STATES = health_pb2.HealthCheckResponse


class Readiness:
    """One answer for the service's own name and for the whole server."""

    def __init__(self, service_name: str) -> None:
        self.servicer = _Health()
        self.is_ready = False
        self._draining = False
        self._names = ("", service_name)
        self._telling: set[asyncio.Task[None]] = set()
        self.set(False)

    def set(self, ready: bool) -> None:
        """From now on; takes effect with the loop's next turn."""
        ready = self.is_ready = ready and not self._draining
        metrics.WORKER_READY.set(ready)
        told = asyncio.create_task(self._tell(ready))
        self._telling.add(told)
        told.add_done_callback(self._telling.discard)

    async def drain(self) -> None:
        """Not ready any more, for good."""
        self._draining = True
        self.is_ready = False
        metrics.WORKER_READY.set(0)
        await self.servicer.enter_graceful_shutdown()

    def end_watches(self) -> None:
        """Lets go of whoever watches; they would hold the drain to the last second of its grace."""
        self.servicer.over.set()

    async def _tell(self, ready: bool) -> None:
        for name in self._names:
            await self.servicer.set(name, _STATES.SERVING if ready else _STATES.NOT_SERVING)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's servicer, with watches that can be ended."""

    def __init__(self) -> None:
        super().__init__()
        self.over = asyncio.Event()

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> None:
        watching = asyncio.create_task(super().Watch(request, context))
        over = asyncio.create_task(self.over.wait())
        try:
            await asyncio.wait({watching, over}, return_when=asyncio.FIRST_COMPLETED)
            await context.write(_STATES(status=_STATES.NOT_SERVING))
        finally:
            watching.cancel()
            over.cancel()
