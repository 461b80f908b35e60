"""The way to the services: addresses, channels, the metadata of a call."""

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc.aio

from zimage_core import tracing
from zimage_core.errors import Cancelled, InvalidSettings, Unavailable
from zimage_core.files import Stamp
from zimage_core.tls import Tls, machine_authorities
from zimage_core.tracing import Span
from zimage_core.wire import limits, request_id
from zimage_core.wire.addresses import is_loopback, several

_log = logging.getLogger(__name__)
_OPTIONS = (
    *limits.CHANNEL_OPTIONS,
    ("grpc.service_config", json.dumps(limits.SERVICE_CONFIG)),
)
_RETIRED_SECONDS = 86_400.0
_SHUNNED_SECONDS = 10.0
_SCHEMES = {"grpc://": False, "grpcs://": True}

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """An address, understood."""

    host: str = ""
    port: int = 0
    path: str = ""
    """Of a Unix socket, instead of host and port."""
    tls: Tls | None = None
    is_open: bool = False
    """Whether others on the way can read what goes there, and nobody said that they may."""

    @property
    def spoken(self) -> str:
        """As people write it."""
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """gRPC's name for it; of a host all addresses, so that calls go round them."""
        return f"unix:{self.path}" if self.path else f"dns:///{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class _Open:
    channel: grpc.aio.Channel
    stamp: tuple[Stamp, ...]
    """Of the certificates that it was made with."""


@dataclass
class Near:
    """The replica that has begun with something, and should go on with it."""

    place: Place | None = None


class Way:
    """The way to the replicas of one service: calls go round them, and for a while round those
    where nobody was."""

    def __init__(self, name: str, addresses: str, tls: Tls | None) -> None:
        self._name = name
        self.places = [place(name, one, tls) for one in several(addresses)]
        self._turn = random.randrange(len(self.places)) if self.places else 0  # noqa: S311
        self._open: dict[Place, _Open] = {}
        self._shunned: dict[Place, float] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def others(self) -> int:
        """How many replicas there are beside the one that a call goes to."""
        return max(0, len(self.places) - 1)

    @contextmanager
    def one_try(self, near: Near | None = None) -> Iterator[grpc.aio.Channel]:
        """A channel to the replica whose turn it is, or to the one that was near."""
        if self._is_closed:
            raise Cancelled("the client is closed")
        if not self.places:
            raise InvalidSettings(
                f"this client was made without the address that it needs now: {self._name}=...",
                reason="NO_ADDRESS",
                fields={"field": self._name},
            )
        at = self._next(near.place if near else None)
        if near:
            near.place = at
        try:
            yield self._channel(at)
        except Unavailable as error:
            if error.reason == "UNREACHABLE":
                self._shunned[at] = time.monotonic() + _SHUNNED_SECONDS
                known = ", ".join(one.spoken for one in self.places)
                among = f", one of {known}" if self.others else ""
                error.add_note(f"the {self._name} asked was {at.spoken}{among}")
            raise

    async def first(self, call: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
        """What the first replica answers that is there."""
        for _ in range(self.others):
            with suppress(Unavailable), self.one_try() as channel:
                return await call(channel)
        with self.one_try() as channel:
            return await call(channel)

    async def close(self) -> None:
        """Ends the connections and whatever runs over them, for good."""
        self._is_closed = True
        for task in self._retiring:
            task.cancel()
        while self._open:
            _, opened = self._open.popitem()
            await opened.channel.close()

    def _next(self, near: Place | None) -> Place:
        now, count = time.monotonic(), len(self.places)
        if near and self._shunned.get(near, now) <= now:
            return near
        in_turn = [self.places[(self._turn + offset) % count] for offset in range(count)]
        chosen = next((at for at in in_turn if self._shunned.get(at, now) <= now), in_turn[0])
        self._turn = self.places.index(chosen) + 1
        return chosen

    def _channel(self, at: Place) -> grpc.aio.Channel:
        """Made when it is first used, in the event loop that uses it, and made anew when its
        certificates were exchanged."""
        opened = self._open.get(at)
        stamp = at.tls.stamp() if at.tls else ()
        if opened is None or opened.stamp != stamp:
            try:
                self._open[at] = _Open(_connected(at, is_alone=not self.others), stamp)
            except InvalidSettings as error:
                if opened is None:
                    raise
                _log.warning("the connection stays as it was: %s", error.message)
            else:
                if opened:
                    self._retire(opened.channel)
        return self._open[at].channel

    def _retire(self, channel: grpc.aio.Channel) -> None:
        """What runs over it may end."""
        task = asyncio.get_running_loop().create_task(channel.close(_RETIRED_SECONDS))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


class Channels:
    """The ways to the services, and what goes with every call."""

    def __init__(
        self,
        server: str = "",
        encoder: str = "",
        trainer: str = "",
        tls: Tls | None = None,
        token: str | Path = "",
    ) -> None:
        self.dit, self.encoder = Way("server", server, tls), Way("encoder", encoder, tls)
        self.trainer = Way("trainer", trainer, tls)
        self._ways = self.dit, self.encoder, self.trainer
        self._token = token
        places = [at for way in self._ways for at in way.places]
        for at in places:
            if at.tls:
                at.tls.read()
        if token:
            _text(token)
            _refuse_open(places)

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are encoded on this side."""
        return bool(self.encoder.places)

    def metadata(self, span: Span | None = None, call_id: str = "") -> Metadata:
        """What goes with the calls of a request: its id, the one at hand or a new one, the token,
        and the trace that it belongs to."""
        known = {
            request_id.KEY: call_id or request_id.current.get() or request_id.fresh(),
            tracing.KEY: span.traceparent if span else "",
            "authorization": f"Bearer {_text(self._token)}" if self._token else "",
        }
        return tuple((key, value) for key, value in known.items() if value)

    async def close(self) -> None:
        """Ends the connections and whatever runs over them, for good."""
        for way in self._ways:
            await way.close()


def _connected(to: Place, *, is_alone: bool) -> grpc.aio.Channel:
    """One among several is not tried again, but left for another."""
    options = [*_OPTIONS, ("grpc.enable_retries", int(is_alone))]
    if is_loopback(to.host):  # whatever the environment says of proxies
        options.append(("grpc.enable_http_proxy", 0))
    if to.tls is None:
        return grpc.aio.insecure_channel(to.target, options=options)
    pems = to.tls.read()
    ca = pems.ca or machine_authorities()
    credentials = grpc.ssl_channel_credentials(ca, pems.key, pems.cert)
    return grpc.aio.secure_channel(to.target, credentials, options=options)


def place(name: str, address: str, tls: Tls | None) -> Place:
    """`tls` counts for every host:port but those that say otherwise."""
    if address.startswith("unix:") and address != "unix:":
        return Place(path=address.removeprefix("unix:"))
    rest, is_secure = address, tls is not None
    for scheme, says in _SCHEMES.items():
        if address.startswith(scheme):
            rest, is_secure = address.removeprefix(scheme), says
    host, colon, port = rest.rpartition(":")
    if colon and host and "/" not in host and port.isdigit() and 0 < int(port) < 1 << 16:
        if is_secure:
            return Place(host, int(port), tls=tls or Tls())
        is_open = rest == address and not is_loopback(host)
        return Place(host, int(port), is_open=is_open)
    raise InvalidSettings(
        f"{name}: {address!r} is no address; give host:port, grpcs://host:port for TLS with the "
        "authorities of this machine, or unix:path",
        reason="ADDRESS",
        fields={"field": name, "given": address},
    )


def _refuse_open(places: Iterable[Place]) -> None:
    for one in places:
        if one.is_open:
            raise InvalidSettings(
                f"a token would go to {one.spoken} for anybody on the way to read; use TLS, or say "
                f"grpc://{one.spoken} where the network is trusted",
                reason="OPEN_ADDRESS",
                fields={"given": one.spoken},
            )


def _text(token: str | Path) -> str:
    """A token, from its file where it stands in one."""
    if isinstance(token, str):
        return token
    try:
        text = token.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(
            f"token_file {token}: {error}", fields={"field": "token_file", "given": str(token)}
        ) from error
    if not text.isprintable() or not text:
        raise InvalidSettings(f"token_file {token} holds no token, which is one line of text")
    return text
