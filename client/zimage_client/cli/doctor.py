"""`zimage-client doctor`: tries every link to the services and says what to change."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict

from zimage_client import AsyncClient
from zimage_client._channel import place
from zimage_client._doctor import Finding, chain, service
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings
from zimage_core.wire import features

_WELL, _ILL = 0, 1
_MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """0 when nothing is wrong."""
    given = {"DiT service": settings.server, "encoder service": settings.encoder}
    if not any(given.values()):
        raise wrong("--server", "which service? Give --server ADDR, --encoder ADDR or both")
    is_well = True
    async with AsyncClient(settings.server, settings.encoder, **settings.credentials) as client:
        for about, findings in _links(settings, client):
            if not args.json:
                terminal.result(f"{about} at {given[about]}" if about in given else about)
            async for finding in findings:
                is_well &= finding.verdict != "wrong"
                terminal.result(_told(args, about, finding))
            if not is_well:
                break
    return _WELL if is_well else _ILL


def _links(
    settings: ClientSettings, client: AsyncClient
) -> Iterator[tuple[str, AsyncIterator[Finding]]]:
    """Each is tried when those before it are well."""
    tls = settings.credentials["tls"]
    for about, address, describe, known in (
        ("DiT service", settings.server, client.describe, features.DIT),
        ("encoder service", settings.encoder, client.describe_encoder, features.ENCODER),
    ):
        if address:
            yield about, service(place(about, address, tls), describe, known)
    if settings.server:
        yield "a picture", chain(client)


def _told(args: Namespace, about: str, finding: Finding) -> str:
    if args.json:
        return json.dumps({"about": about, **asdict(finding)})
    advice = f"\n{'':<19}-> {finding.advice}" if finding.advice else ""
    return f"  {_MARKS[finding.verdict]:<6}{finding.check:<11}{finding.said}{advice}"
