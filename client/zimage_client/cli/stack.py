"""The client of a command: of the services in the settings, else of the embedded ones."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from zimage_client import AsyncClient
from zimage_client._embedded import warm
from zimage_client._embedded.stack import (
    Addresses,
    brief_stack,
    demo_model,
    refuse_what_cannot_work,
)
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings


@asynccontextmanager
async def for_pictures(settings: ClientSettings, terminal: Terminal) -> AsyncIterator[AsyncClient]:
    """Of a DiT service and, where prompts are encoded on this side, an encoder."""
    if settings.server:
        async with AsyncClient(settings.server, settings.encoder, **settings.credentials) as client:
            yield client
        return
    if settings.encoder:
        raise wrong(
            "--server",
            "--encoder without --server: the embedded DiT service takes only its own encoder's "
            "embeddings; give --server ADDR, too",
        )
    async with _embedded(terminal, dit=True) as addresses, AsyncClient(addresses.server) as client:
        yield client


@asynccontextmanager
async def for_both(settings: ClientSettings, terminal: Terminal) -> AsyncIterator[AsyncClient]:
    """Of a DiT service, and of an encoder where one is configured or embedded."""
    if settings.server or settings.encoder:
        async with for_pictures(settings, terminal) as client:
            yield client
        return
    async with (
        _embedded(terminal, dit=True) as at,
        AsyncClient(at.server, at.encoder) as client,
    ):
        yield client


@asynccontextmanager
async def for_prompts(settings: ClientSettings, terminal: Terminal) -> AsyncIterator[AsyncClient]:
    """Of an encoder service."""
    if settings.encoder:
        async with AsyncClient(encoder=settings.encoder, **settings.credentials) as client:
            yield client
        return
    if settings.server:
        raise wrong(
            "--encoder",
            "encoding needs an encoder service; give --encoder ADDR (a DiT service does not lend "
            "its own)",
        )
    async with (
        _embedded(terminal, dit=False) as addresses,
        AsyncClient(encoder=addresses.encoder) as client,
    ):
        yield client


@asynccontextmanager
async def _embedded(terminal: Terminal, *, dit: bool) -> AsyncIterator[Addresses]:
    """The stack that is up; else, at a terminal, one that stays warm for the next command; else one
    for this command alone."""
    refuse_what_cannot_work()
    if stack := warm.chosen():
        async with warm.used(stack.model, terminal.live) as stack:
            yield stack.addresses
        return
    flag = "--server" if dit else "--encoder"
    terminal.note(
        f"no {flag} is configured: the embedded demo model is used, which draws one or "
        f"two coloured shapes; {flag} ADDR or `zimage-client up --model FOLDER` use Z-Image itself"
    )
    if not terminal.is_interactive:
        async with brief_stack(terminal.live, dit=dit) as addresses:
            yield addresses
        return
    async with warm.used(demo_model(), terminal.live) as stack:
        yield stack.addresses
