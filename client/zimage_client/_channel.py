"""The way to the services: addresses, channels, the metadata of a call."""

import asyncio
import json
import logging
from dataclasses import dataclass

import grpc.aio

from zimage_core.errors import Cancelled, InvalidSettings
from zimage_core.tls import Stamp, Tls
from zimage_core.wire import limits, request_id

_log = logging.getLogger(__name__)
_OPTIONS = (
    *limits.CHANNEL_OPTIONS,
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(limits.SERVICE_CONFIG)),
)
_RETIRED_SECONDS = 86_400.0
_SCHEMES = {"grpc://": False, "grpcs://": True}

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """An address, understood."""

    target: str
    """gRPC's name for it."""
    tls: Tls | None


@dataclass(frozen=True, slots=True)
class _Open:
    channel: grpc.aio.Channel
    stamp: Stamp
    """Of the certificates that it was made with."""


class Channels:
    """One channel to each service, made when it is first used, in the event loop that uses it, and
    made anew when its certificates were exchanged."""

    def __init__(self, server: str, encoder: str, tls: Tls | None = None) -> None:
        given = {"server": server, "encoder": encoder}
        self._places = {name: _place(name, a, tls) for name, a in given.items() if a}
        self._open: dict[str, _Open] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are encoded on this side."""
        return "encoder" in self._places

    def dit(self) -> grpc.aio.Channel:
        """The way to the DiT service."""
        return self._channel("server")

    def encoder(self) -> grpc.aio.Channel:
        """The way to the encoder service."""
        return self._channel("encoder")

    async def close(self) -> None:
        """Ends the connections and whatever runs over them, for good."""
        self._is_closed = True
        for task in self._retiring:
            task.cancel()
        while self._open:
            _, opened = self._open.popitem()
            await opened.channel.close()

    def _channel(self, name: str) -> grpc.aio.Channel:
        if self._is_closed:
            raise Cancelled("the client is closed")
        if name not in self._places:
            raise InvalidSettings(
                f"this client was made without the address that it needs now: {name}=...",
                reason="NO_ADDRESS",
                fields={"field": name},
            )
        place, opened = self._places[name], self._open.get(name)
        stamp = place.tls.stamp() if place.tls else ()
        if opened is None or opened.stamp != stamp:
            try:
                self._open[name] = _Open(_connected(place), stamp)
            except InvalidSettings as error:
                if opened is None:
                    raise
                _log.warning("the connection stays as it was: %s", error.message)
            else:
                if opened:
                    self._retire(opened.channel)
        return self._open[name].channel

    def _retire(self, channel: grpc.aio.Channel) -> None:
        """What runs over it may end."""
        task = asyncio.get_running_loop().create_task(channel.close(_RETIRED_SECONDS))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def metadata() -> Metadata:
    """What goes with the calls of a request: its id, the one at hand or a new one."""
    return ((request_id.KEY, request_id.current.get() or request_id.fresh()),)


def _connected(place: _Place) -> grpc.aio.Channel:
    if place.tls is None:
        return grpc.aio.insecure_channel(place.target, options=_OPTIONS)
    pems = place.tls.read()
    credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)
    return grpc.aio.secure_channel(place.target, credentials, options=_OPTIONS)


def _place(name: str, address: str, tls: Tls | None) -> _Place:
    """`tls` counts for every host:port but those that say otherwise."""
    if address.startswith("unix:") and address != "unix:":
        return _Place(address, None)
    rest, is_secure = address, tls is not None
    for scheme, says in _SCHEMES.items():
        if address.startswith(scheme):
            rest, is_secure = address.removeprefix(scheme), says
    host, colon, port = rest.rpartition(":")
    if colon and host and "/" not in host and port.isdigit() and 0 < int(port) < 1 << 16:
        # dns: all addresses of the name, so that calls go round them
        return _Place(f"dns:///{rest}", (tls or Tls()) if is_secure else None)
    raise InvalidSettings(
        f"{name}: {address!r} is no address; give host:port, grpcs://host:port for TLS with the "
        "authorities of this machine, or unix:path",
        reason="ADDRESS",
        fields={"field": name, "given": address},
    )
