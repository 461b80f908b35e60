"""A relay of bytes that counts them and cuts connections."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE_BYTES = 1 << 16


class Relay:
    """Between clients and one service at a Unix socket."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self.sent_bytes = 0
        """By clients, over all connections."""
        self._cuts: list[int] = []
        self.cut_count = 0
        self.address = ""

    def cut_after(self, *sent_bytes: int) -> None:
        """Cuts all connections whenever clients have sent so much in all."""
        self._cuts = sorted(sent_bytes)

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
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
        self._open |= {writer, ours}
        await asyncio.gather(
            self._pass(reader, ours, counts=True), self._pass(theirs, writer, counts=False)
        )

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, counts: bool
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
                sink.write(piece)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    def _cut(self) -> None:
        while self._open:
            self._open.pop().transport.abort()


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
