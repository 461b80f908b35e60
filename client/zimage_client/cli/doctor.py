"""`zimage-client doctor`: tries every link to the services and says what to change."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict

from zimage_client import AsyncClient
from zimage_client._channel import place
from zimage_client._doctor import Finding, bandwidth, chain, drift, service
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings
from zimage_core.wire import features
from zimage_core.wire.addresses import several

_WELL, _ILL = 0, 1
_MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """0 when nothing is wrong."""
    if not settings.server and not settings.encoder:
        raise wrong("--server", "which service? Give --server ADDR, --encoder ADDR or both")
    async for about, finding in _findings(settings):
        if args.json:
            terminal.result(json.dumps({"about": about, **asdict(finding)}))
        else:
            terminal.result(_line(about, finding))
        if finding.verdict == "wrong":
            return _ILL
    return _WELL


async def _findings(settings: ClientSettings) -> AsyncIterator[tuple[str, Finding]]:
    """Each replica for itself, then all together."""
    credentials = settings.credentials
    for addresses, known in ((settings.server, features.DIT), (settings.encoder, features.ENCODER)):
        for address in several(addresses):
            at = place("address", address, credentials.get("tls"))
            is_dit = known is features.DIT
            given = {"server" if is_dit else "encoder": address}
            async with AsyncClient(**given, **credentials) as client:
                describe = client.describe if is_dit else client.describe_encoder
                async for finding in service(at, describe, known):
                    yield address, finding
                if is_dit:
                    yield address, await bandwidth(client)
    encoders = several(settings.encoder)
    if len(encoders) > 1:
        async with AsyncExitStack() as closing:
            clients = [AsyncClient(encoder=one, **credentials) for one in encoders]
            for client in clients:
                await closing.enter_async_context(client)
            yield settings.encoder, await drift(clients)
    if settings.server:
        async with AsyncClient(settings.server, settings.encoder, **credentials) as client:
            async for finding in chain(client):
                yield settings.server, finding


def _line(about: str, finding: Finding) -> str:
    mark = _MARKS[finding.verdict]
    advice = f"\n{'':<6}-> {finding.advice}" if finding.advice else ""
    return f"{mark:<6}{about}  {finding.check}: {finding.said}{advice}"
