"""A relay of bytes that counts them, and cuts, half-closes and stalls connections."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PIECE_BYTES = 1 << 16


class _Connection:
    """A client and the service."""

    def __init__(self, client: asyncio.StreamWriter, service: asyncio.StreamWriter) -> None:
        self.client = client
        self.service = service
        self.moves = asyncio.Event()
        self.moves.set()
        self.is_half_closed = False

    def half_close(self) -> None:
        self.is_half_closed = True
        self.service.write_eof()

    def cut(self) -> None:
        for side in (self.client, self.service):
            side.transport.abort()


class Relay:
    """Between clients and one service at a Unix socket."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._open: list[_Connection] = []
        self.sent_bytes = 0
        """By clients, over all connections."""
        self._cuts: list[int] = []
        self.cut_count = 0
        self.address = ""

    def cut_after(self, *sent_bytes: int) -> None:
        """Cuts all connections whenever clients have sent so much in all."""
        self._cuts = sorted(sent_bytes)

    def cut(self) -> None:
        """Cuts all connections now."""
        self._loop.call_soon_threadsafe(self._cut)

    def half_close(self) -> None:
        """The service hears of all connections that their clients have nothing more to say."""
        self._each(_Connection.half_close)

    def stall(self) -> None:
        """Nothing passes on the connections of now any more, and nobody is told."""
        self._each(lambda connection: connection.moves.clear())

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        ready.set()
        async with server:
            await stop.wait()
            self._cut()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = self._target.removeprefix("unix:")
        theirs, ours = await asyncio.open_unix_connection(path)
        connection = _Connection(writer, ours)
        self._open.append(connection)
        await asyncio.gather(
            self._pass(reader, ours, connection, counts=True),
            self._pass(theirs, writer, connection, counts=False),
        )

    async def _pass(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        connection: _Connection,
        *,
        counts: bool,
    ) -> None:
        try:
            while piece := await source.read(_PIECE_BYTES):
                if counts:
                    self.sent_bytes += len(piece)
                    if self._cuts and self.sent_bytes >= self._cuts[0]:
                        self._cuts.pop(0)
                        self.cut_count += 1
                        self._cut()
                        return
                await connection.moves.wait()
                if counts and connection.is_half_closed:
                    continue
                sink.write(piece)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    def _each(self, strike: Callable[[_Connection], None]) -> None:
        for connection in self._open:
            self._loop.call_soon_threadsafe(strike, connection)

    def _cut(self) -> None:
        while self._open:
            connection = self._open.pop()
            connection.cut()
            connection.moves.set()


@contextmanager
def relaying(target: str) -> Iterator[Relay]:
    """A relay to unix:path, in a thread of its own."""
    relay, ready, stop = Relay(target), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[relay.serve(ready, stop)])
    thread.start()
    assert ready.wait(10)
    try:
        yield relay
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
