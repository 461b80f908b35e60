"""The small HTTP face for whoever cannot speak gRPC: /livez, /readyz and /metrics."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from zimage_core.errors import InvalidSettings
from zimage_core.serving import metrics

_LONGEST_REQUEST_SECONDS = 5.0
_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def start(address: str, is_ready: Callable[[], bool]) -> asyncio.Server:
    """Listens on host:port; /livez is 200 while the loop turns, /readyz once the model is ready."""

    async def answer(path: str) -> tuple[HTTPStatus, bytes]:
        match path:
            case "/livez":
                return HTTPStatus.OK, b"alive\n"
            case "/readyz" if is_ready():
                return HTTPStatus.OK, b"ready\n"
            case "/readyz":
                return HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n"
            case "/metrics":
                return HTTPStatus.OK, await asyncio.to_thread(metrics.page)
            case _:
                return HTTPStatus.NOT_FOUND, b"try /livez, /readyz or /metrics\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_LONGEST_REQUEST_SECONDS):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split(" ")
                status, text = await answer(head[1] if len(head) > 1 else "")
                writer.write(
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {_TYPE}\r\n"
                    f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode()
                    + text
                )
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass  # whoever asked is gone or does not speak HTTP
        finally:
            writer.close()

    host, _, port = address.rpartition(":")
    try:
        return await asyncio.start_server(serve, host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        raise InvalidSettings(
            f"probes {address}: cannot listen there: {error}",
            reason="CANNOT_LISTEN",
            fields={"field": "probes", "given": address},
        ) from error
