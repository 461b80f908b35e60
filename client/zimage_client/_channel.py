"""The way to the services: addresses, channels, the metadata of a call."""

import json

import grpc.aio

from zimage_core.errors import Cancelled, InvalidSettings
from zimage_core.wire import limits, request_id

_OPTIONS = (
    *limits.CHANNEL_OPTIONS,
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(limits.SERVICE_CONFIG)),
)

Metadata = tuple[tuple[str, str], ...]


class Channels:
    """One channel to each service, made when it is first used, in the event loop that uses it."""

    def __init__(self, server: str, encoder: str) -> None:
        self._addresses = {"server": server, "encoder": encoder}
        self._targets = {name: _target(name, given) for name, given in self._addresses.items()}
        self._open: dict[str, grpc.aio.Channel] = {}
        self._is_closed = False

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are encoded on this side."""
        return bool(self._addresses["encoder"])

    def dit(self) -> grpc.aio.Channel:
        """The way to the DiT service."""
        return self._channel("server")

    def encoder(self) -> grpc.aio.Channel:
        """The way to the encoder service."""
        return self._channel("encoder")

    async def close(self) -> None:
        """Ends the connections and whatever runs over them, for good."""
        self._is_closed = True
        while self._open:
            _, channel = self._open.popitem()
            await channel.close()

    def _channel(self, name: str) -> grpc.aio.Channel:
        if self._is_closed:
            raise Cancelled("the client is closed")
        if name not in self._open:
            if not self._addresses[name]:
                raise InvalidSettings(
                    f"this client was made without the address that it needs now: {name}=...",
                    reason="NO_ADDRESS",
                    fields={"field": name},
                )
            self._open[name] = grpc.aio.insecure_channel(self._targets[name], options=_OPTIONS)
        return self._open[name]


def metadata() -> Metadata:
    """What goes with the calls of a request: its id, the one at hand or a new one."""
    return ((request_id.KEY, request_id.current.get() or request_id.fresh()),)


def _target(name: str, address: str) -> str:
    """gRPC's name for an address."""
    if not address or address.removeprefix("unix:") not in ("", address):
        return address
    host, colon, port = address.rpartition(":")
    if colon and host and "/" not in host and port.isdigit() and 0 < int(port) < 1 << 16:
        return f"dns:///{address}"  # all addresses of the name, so that calls go round them
    raise InvalidSettings(
        f"{name}: {address!r} is no address; give host:port or unix:path",
        reason="ADDRESS",
        fields={"field": name, "given": address},
    )
