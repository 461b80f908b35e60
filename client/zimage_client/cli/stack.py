"""Which services a command talks to: those in the settings, else the embedded ones."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from zimage_client._embedded import embedded_stack
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings


@asynccontextmanager
async def for_pictures(
    settings: ClientSettings, terminal: Terminal
) -> AsyncIterator[tuple[str, str]]:
    """The addresses of a DiT service and, where prompts are encoded on this side, an encoder."""
    if settings.server:
        yield settings.server, settings.encoder
        return
    if settings.encoder:
        raise wrong(
            "--server",
            "--encoder without --server: the embedded DiT service has a random model and takes "
            "only its own encoder's embeddings; give --server ADDR, too",
        )
    terminal.note(
        "no server is configured: the embedded stack starts, with a random model whose pictures "
        "are noise; --server ADDR uses a real one"
    )
    async with embedded_stack(terminal.live) as stack:
        yield stack.server, ""


@asynccontextmanager
async def for_prompts(settings: ClientSettings, terminal: Terminal) -> AsyncIterator[str]:
    """The address of an encoder service."""
    if settings.encoder:
        yield settings.encoder
        return
    if settings.server:
        raise wrong(
            "--encoder",
            "encoding needs an encoder service; give --encoder ADDR (a DiT service does not lend "
            "its own)",
        )
    terminal.note(
        "no encoder is configured: an embedded one starts, with a random model; --encoder ADDR "
        "uses a real one"
    )
    async with embedded_stack(terminal.live, dit=False) as stack:
        yield stack.encoder
