"""`zimage-client plan --here`: what the services do, how far they are, and what best goes where."""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from zimage_client import AsyncClient
from zimage_client._placing import DitHere, EncoderHere, advice, dit_here, encoder_here
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.errors import ZImageError
from zimage_core.settings import ClientSettings
from zimage_core.wire.addresses import several


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Makes small pictures and sends some megabytes to each."""
    if not settings.server and not settings.encoder:
        raise wrong("--server", "which services? Give --server ADDR,... --encoder ADDR,...")
    encoders: list[EncoderHere] = []
    dits: list[DitHere] = []
    credentials = settings.credentials
    for address in several(settings.encoder):
        with _noted(address, terminal):
            async with AsyncClient(encoder=address, **credentials) as client:
                encoders.append(await encoder_here(client, address))
    for address in several(settings.server):
        with _noted(address, terminal):
            async with AsyncClient(address, settings.encoder, **credentials) as client:
                dits.append(await dit_here(client, address))
    services: list[EncoderHere | DitHere] = [*encoders, *dits]
    for found in services:
        terminal.result(json.dumps(asdict(found)) if args.json else _told(found))
    for what, said in advice(encoders, dits):
        terminal.result(
            json.dumps({"part": what, "advice": said}) if args.json else f"{what:8} {said}"
        )


@contextmanager
def _noted(address: str, terminal: Terminal) -> Iterator[None]:
    """The others are measured, too, where one cannot be."""
    terminal.live(f"measuring {address}")
    try:
        yield
    except ZImageError as error:
        terminal.note(f"{address}: not measured: {error.message}")


def _told(found: EncoderHere | DitHere) -> str:
    if isinstance(found, EncoderHere):
        return (
            f"{found.address}  encoder, {found.device}: {found.prompt_seconds:.2f} s a prompt, "
            f"{found.embedding_bytes / 1e6:.2f} MB"
        )
    speed = f"{found.speed.there / 1e6:.0f} MB/s there, {found.speed.back / 1e6:.0f} MB/s back"
    return (
        f"{found.address}  DiT, {found.device}: {found.forward_seconds:.3f} s a forward at "
        f"{found.side_px}x{found.side_px}, {found.picture_bytes / 1e6:.2f} MB a picture; {speed}"
    )
