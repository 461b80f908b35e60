"""The embedded stack: both services as child processes on private sockets, for whoever has none.

The children live as long as the block: each ends when its standard input does, so that not even
kill -9 of this process leaves one behind. They have a session of their own, so that Ctrl-C reaches
only the caller, who then stops them in order.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import platformdirs

from zimage_client._client import AsyncClient
from zimage_core.errors import DeadlineTooShort, InternalError, NotReady, Unavailable

_NEEDED = ("torch", "transformers", "diffusers", "tokenizers", "grpc_health")
_LONGEST_SOCKET_PATH = 104  # bytes, on macOS; Linux has 108
_SOCKET_NAME_BYTES = 16
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 2
_STOP_SECONDS = 10.0
_LOG_LINES = 15
"""How much of a log an error shows."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services of a stack listen; empty for one that was not wanted."""

    server: str
    encoder: str


@asynccontextmanager
async def embedded_stack(
    say: Callable[[str], None], *, encoder: bool = True, dit: bool = True
) -> AsyncIterator[Addresses]:
    """Runs the wanted services while the block does; `say` hears what is going on meanwhile."""
    _refuse_what_cannot_work()
    model = await _model(say)
    say("starting the embedded services")
    async with _folder() as folder, AsyncExitStack() as running:
        encoder_address = f"unix:{folder / 'encoder.sock'}" if encoder else ""
        dit_address = f"unix:{folder / 'dit.sock'}" if dit else ""
        services = []
        if encoder:
            service = _Service("encoder_service", AsyncClient(encoder=encoder_address), folder)
            services.append()
        yield Addresses(dit_address, encoder_address)
