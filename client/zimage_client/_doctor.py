"""What is wrong on the way to the services, found out link by link: name, port, TLS, service.

gRPC tells of a connection that fails only that it failed; so the links below it are tried by hand.
"""

import asyncio
import socket
import ssl
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal

from zimage_client._channel import Place
from zimage_client._client import AsyncClient
from zimage_client._description import DitDescription, EncoderDescription
from zimage_client._placing import speed
from zimage_core.drift import NEAR_COSINE, SAME_COSINE, least_cosine
from zimage_core.errors import (
    Forbidden,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    ZImageError,
)
from zimage_core.tls import Tls

_CONNECT_SECONDS = 3.0
_ROUND_TRIPS = 9
_SOON_DAYS = 14
_LONG_EMBEDDING_BYTES = 512 * 2560 * 2
"""Of the real model, in bfloat16."""
_PROBE = "a red circle on a blue background, and beside it a small green square under a yellow star"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How HTTP/2 begins: this text and empty settings."""
_FRAME_BYTES = 9
_SETTINGS = 4

Verdict = Literal["ok", "note", "wrong"]
Description = DitDescription | EncoderDescription
Describe = Callable[..., Awaitable[Description]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    said: str
    advice: str = ""


class _Broken(Exception):
    """A link without which the next cannot be tried."""

    def __init__(self, check: str, said: str, advice: str) -> None:
        self.finding = Finding(check, "wrong", said, advice)


async def service(at: Place, describe: Describe, known: tuple[str, ...]) -> AsyncIterator[Finding]:
    """The links to a service and what answers there; nothing comes after what is wrong."""
    try:
        if at.path:
            yield await _socket(at.path)
        else:
            addresses = sorted(await _addresses(at))
            yield Finding("name", "ok", f"{at.host} is {', '.join(addresses)}")
            for address in addresses:
                yield await _port(address, at.port)
            yield await (_secure(at, at.tls) if at.tls else _plain(at))
        found = await describe(timeout=_CONNECT_SECONDS)
    except _Broken as broken:
        yield broken.finding
        return
    except ZImageError as error:
        yield Finding("service", "wrong", error.message, _advice(error))
        return
    own = version("zimage-grpc")
    if found.version == own:
        yield Finding("version", "ok", found.version)
    else:
        advice = "roll out encoder, DiT, clients in that order"
        yield Finding("version", "note", f"{found.version}, here {own}", advice)
    if missing := sorted(set(known) - set(found.features)):
        yield Finding("features", "note", f"it lacks {', '.join(missing)}", "update it")
    if found.ready:
        yield Finding("model", "ok", f"loaded; the worker is {found.worker.state}")
    else:
        yield Finding("model", "note", "is being loaded", "calls wait for it")
    yield await _round_trip(describe)


async def chain(client: AsyncClient) -> AsyncIterator[Finding]:
    """Whether the services fit together, and make a picture."""
    dit = await client.describe()
    encoder = (await client.describe_encoder()).model if client.encodes else None
    pinned = dit.model.encoder_identity if dit.model else ""
    if not dit.has_encoder and not client.encodes:
        yield Finding(
            "encoder",
            "wrong",
            "the DiT service has no encoder and none is given here",
            "start it with --encoder ADDR, or give --encoder ADDR to the client",
        )
        return
    if encoder and pinned:
        fits = encoder.identity == pinned
        said = f"identity {encoder.identity[:12]}, the DiT service takes {pinned[:12]}"
        advice = "" if fits else "use the text encoder and tokenizer that belong to the DiT model"
        yield Finding("encoder", "ok" if fits else "wrong", said, advice)
    if not dit.limits or (client.encodes and not encoder):
        yield Finding("picture", "note", "not tried: a model is being loaded")
        return
    side, began = dit.limits.side_multiple_px, time.monotonic()
    try:
        await client.generate("a test", width=side, height=side, steps=1, retry=False)
    except ZImageError as error:
        yield Finding("picture", "wrong", error.message, _advice(error))
        return
    took = time.monotonic() - began
    yield Finding("picture", "ok", f"one step at {side}x{side} pixels in {took:.2f} s")


async def bandwidth(client: AsyncClient) -> Finding:
    """How fast files go to the DiT service and back."""
    try:
        found = await speed(client)
    except ZImageError as error:
        return Finding("bandwidth", "note", f"not measured: {error.message}")
    embedding_seconds = _LONG_EMBEDDING_BYTES / found.there
    said = f"{found.there / 1e6:.1f} MB/s there, {found.back / 1e6:.1f} MB/s back"
    if embedding_seconds < 1:
        return Finding("bandwidth", "ok", said)
    advice = (
        f"the embedding of a long prompt takes {embedding_seconds:.0f} s to send: let the DiT "
        "service have an encoder, and send prompts as text"
    )
    return Finding("bandwidth", "note", said, advice)


async def drift(encoders: Sequence[AsyncClient]) -> Finding:
    """Whether replicas of an encoder say the same of a prompt."""
    try:
        first, *others = [
            await encoder.encode(_PROBE, packing="solo", retry=False) for encoder in encoders
        ]
    except Unavailable as error:
        return Finding("drift", "note", f"not measured: {error.message}", "calls wait for it")
    except ZImageError as error:
        return Finding("drift", "wrong", error.message, _advice(error))
    engines = {str(one.numerics) for one in (first, *others)}
    if {one.tensor.shape for one in others} != {first.tensor.shape}:
        said = "their embeddings have different shapes"
        return Finding("drift", "wrong", said, "let all replicas run the same model")
    cosine = min(least_cosine(first.tensor, other.tensor) for other in others)
    said = f"cosine {cosine:.5f} over {len(encoders)} replicas ({'; '.join(sorted(engines))})"
    if cosine >= SAME_COSINE:
        return Finding("drift", "ok", said)
    advice = "pictures depend on who encodes: let all replicas run the same model in the same type"
    return Finding("drift", "note" if cosine >= NEAR_COSINE else "wrong", said, advice)


async def _socket(path: str) -> Finding:
    try:
        await _closed(*await asyncio.open_unix_connection(path))
    except FileNotFoundError as error:
        advice = "is the service running, and is this its --listen?"
        raise _Broken("socket", f"{path} does not exist", advice) from error
    except OSError as error:
        advice = "its service is gone, or the socket belongs to another user"
        raise _Broken("socket", f"{path}: {error.strerror or error}", advice) from error
    return Finding("socket", "ok", path)


async def _addresses(place: Place) -> set[str]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(place.host.strip("[]"), place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        said = f"{place.host} cannot be resolved: {error.strerror or error}"
        raise _Broken(
            "name", said, "is the name spelled right, and known to this machine?"
        ) from error
    return {str(entry[4][0]) for entry in found}


async def _port(address: str, port: int) -> Finding:
    began = time.monotonic()
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await _closed(*await asyncio.open_connection(address, port))
    except TimeoutError as error:
        said = f"{address} port {port}: no answer within {_CONNECT_SECONDS:g} s"
        raise _Broken(
            "port", said, "is the machine on, and does a firewall let it through?"
        ) from error
    except OSError as error:
        said = f"{address} port {port}: {error.strerror or error}"
        advice = "is the service running there, and does its --listen let other machines in?"
        raise _Broken("port", said, advice) from error
    milliseconds = (time.monotonic() - began) * 1e3
    return Finding("port", "ok", f"{address} port {port} answers within {milliseconds:.1f} ms")


async def _secure(place: Place, tls: Tls) -> Finding:
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.cert:
            context.load_cert_chain(tls.cert, tls.key)
        context.set_alpn_protocols(["h2"])
        reader, writer = await _connected(place, context)
        try:
            spoken = writer.get_extra_info("ssl_object")
            await _greeted(reader, writer)  # a certificate of ours that is refused is so only now
            return _of_certificate(spoken.version(), spoken.getpeercert())
        finally:
            await _closed(reader, writer)
    except ssl.SSLCertVerificationError as error:
        raise _Broken("TLS", f"its certificate: {error.verify_message}", _VERIFY) from error
    except (ssl.SSLError, OSError, EOFError, TimeoutError) as error:
        if "WRONG_VERSION_NUMBER" in str(error):
            advice = "leave the tls settings out, or say grpc://ADDR"
            raise _Broken("TLS", "it speaks no TLS", advice) from error
        # gRPC hangs up on a certificate of ours that it does not take, and says nothing.
        raise _Broken("TLS", "it hung up after the handshake", _of_our_own(tls)) from error


_VERIFY = (
    "tls_ca must hold the authority that made it, its names must include this address, and it must "
    "not have expired; `zimage-client certs` makes a new one"
)
_BELIEVED = "it must come from an authority in the service's tls_client_ca"


def _of_our_own(tls: Tls) -> str:
    """What a service may have against our certificate; tried out with our own authorities, which
    most often are the service's, too."""
    if not tls.cert:
        return "it may want a certificate of yours: --tls-cert, --tls-key"
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(tls.cert, tls.key)
    here = ssl.create_default_context(cafile=tls.ca)
    here.check_hostname = False
    to_there, to_here = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = here.wrap_bio(to_here, to_there)
    service = there.wrap_bio(to_there, to_here, server_side=True)
    try:
        for side in (caller, service, caller):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return f"your certificate: {error.verify_message}; {_BELIEVED}"
    return f"it may not believe your certificate: {_BELIEVED}; its log may say more"


def _of_certificate(spoken: str, certificate: dict[str, object]) -> Finding:
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    days = (ends - datetime.now(UTC)).days
    names = [str(value) for _, value in certificate.get("subjectAltName", ())]  # type: ignore[attr-defined]
    said = f"{spoken}, a certificate for {', '.join(names)}, {days} days left"
    if days < _SOON_DAYS:
        return Finding("TLS", "note", said, "exchange it soon")
    return Finding("TLS", "ok", said)


async def _plain(place: Place) -> Finding:
    try:
        reader, writer = await _connected(place, None)
        try:
            await _greeted(reader, writer)
        finally:
            await _closed(reader, writer)
    except (OSError, EOFError, TimeoutError) as error:
        if await _speaks_tls(place):
            advice = "give --tls-ca, and --tls-cert and --tls-key where it wants a certificate"
            raise _Broken("HTTP/2", "it speaks TLS", advice) from error
        raise _Broken("HTTP/2", "it does not speak it", "is a Z-Image service there?") from error
    return Finding("HTTP/2", "ok", "answers, without TLS")


async def _speaks_tls(place: Place) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with suppress(OSError, EOFError, TimeoutError):
        await _closed(*await _connected(place, context))
        return True
    return False


async def _connected(
    place: Place, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(_CONNECT_SECONDS):
        return await asyncio.open_connection(place.host.strip("[]"), place.port, ssl=context)


async def _greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Returns when the other side has begun to speak HTTP/2."""
    writer.write(_PREFACE)
    async with asyncio.timeout(_CONNECT_SECONDS):
        frame = await reader.readexactly(_FRAME_BYTES)
    if frame[3] != _SETTINGS:
        raise EOFError("no HTTP/2")


async def _closed(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _round_trip(describe: Describe) -> Finding:
    times = []
    for _ in range(_ROUND_TRIPS):
        began = time.monotonic()
        await describe(timeout=_CONNECT_SECONDS)
        times.append((time.monotonic() - began) * 1e3)
    said = f"{statistics.median(times):.1f} ms, the slowest of {_ROUND_TRIPS} {max(times):.1f} ms"
    return Finding("round trip", "ok", said)


def _advice(error: ZImageError) -> str:
    match error:
        case Unauthenticated(reason="TOKEN_MISSING" | "TOKEN_INVALID"):
            return "give --token-file with a token of its --tokens file"
        case Forbidden():
            return "ask for a token with that role"
        case Unimplemented():
            return "--server is for a DiT service, --encoder for an encoder service"
        case _:
            return "its log knows more"
