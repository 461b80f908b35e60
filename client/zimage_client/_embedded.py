"""The embedded stack: the services as child processes on private sockets, for whoever has none.

The children live as long as the block. Each ends when its standard input does, so that not even
kill -9 of this process leaves one behind; each has a session of its own, so that Ctrl-C reaches
only this process, which then stops them.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import warnings
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import platformdirs

from zimage_client._client import AsyncClient
from zimage_client._description import DitDescription, EncoderDescription
from zimage_core.errors import DeadlineTooShort, InternalError, NotReady, Unavailable

_NEEDED = ("torch", "transformers", "diffusers", "tokenizers", "grpc_health")
_LONGEST_SOCKET_PATH = 103  # bytes: macOS has room for 104, the closing zero included
_POLL_SECONDS = 0.1
_DESCRIBE_SECONDS = 1.0
_GRACE_SECONDS = 2
_STOP_SECONDS = 10.0
_LOG_LINES_SHOWN = 15


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services of a stack listen."""

    server: str
    """Empty without a DiT."""
    encoder: str


@asynccontextmanager
async def embedded_stack(
    say: Callable[[str], None], *, dit: bool = True
) -> AsyncIterator[Addresses]:
    """Runs the services while the block does; `say` hears what goes on until they serve."""
    _refuse_what_cannot_work()
    with _private_folder() as folder:
        addresses = Addresses(
            server=f"unix:{folder / 'dit.sock'}" if dit else "",
            encoder=f"unix:{folder / 'encoder.sock'}",
        )
        model = await _model(folder, say)
        say("starting the embedded services")
        async with AsyncExitStack() as running:

            async def start(module: str, address: str, *more: str) -> _Child:
                flags = [*_flags(model, address), *more]
                child = _running(module, flags, folder / f"{module}.log")
                return await running.enter_async_context(child)

            async with AsyncClient(addresses.server, addresses.encoder) as client:
                child = await start("encoder_service", addresses.encoder)
                started: list[tuple[_Child, _Describe]] = [(child, client.describe_encoder)]
                if dit:
                    child = await start(
                        "dit_service", addresses.server, "--encoder", addresses.encoder
                    )
                    started.append((child, client.describe))
                for child, describe in started:
                    await child.serves(describe)
            yield addresses


_Describe = Callable[..., Awaitable[DitDescription | EncoderDescription]]


@dataclass(frozen=True, slots=True)
class _Child:
    """A child process with its log."""

    module: str
    process: Process
    log: Path

    async def serves(self, describe: _Describe) -> None:
        """Waits until the service is ready; raises InternalError when it ends before."""

        async def ready() -> None:
            while True:
                with contextlib.suppress(Unavailable, DeadlineTooShort):
                    if (await describe(timeout=_DESCRIBE_SECONDS)).ready:
                        return
                await asyncio.sleep(_POLL_SECONDS)

        waits = [asyncio.create_task(ready()), asyncio.create_task(self.process.wait())]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if waits[0] not in done:
                raise self.ended()
            await waits[0]
        finally:
            for wait in waits:
                wait.cancel()

    def ended(self) -> InternalError:
        """The error of a child that ended by itself."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = "\n".join(f"  {line}" for line in lines[-_LOG_LINES_SHOWN:])
        code = self.process.returncode
        return InternalError(
            f"{self.module} ended with exit code {code} while it started; its last words:\n{shown}",
            reason="EMBEDDED_STACK",
            fields={"log": str(self.log), "exit_code": str(code)},
        )


@asynccontextmanager
async def _running(module: str, arguments: list[str], log: Path) -> AsyncIterator[_Child]:
    """A child process that runs while the block does."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=PIPE,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
        )
    try:
        yield _Child(module, process, log)
    finally:
        await _stop(process)


async def _stop(process: Process) -> None:
    """Asks first; takes the whole session down when that does not help."""
    if process.returncode is not None:
        return
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _flags(model: Path, address: str) -> list[str]:
    """What the user's settings file says of services is not meant for these."""
    where = ["--config", os.devnull, "--listen", address, "--probes", ""]
    return [
        *where,
        "--model",
        str(model),
        "--exit-with-stdin",
        "--grace-seconds",
        str(_GRACE_SECONDS),
    ]


async def _model(folder: Path, say: Callable[[str], None]) -> Path:
    """The random model of this version, built once into the user's cache."""
    model = platformdirs.user_cache_path("zimage") / f"random-model-{version('zimage-grpc')}"
    if not (model / "model_index.json").is_file():
        say(f"building a random model, once, in {model}")
        log = folder / "model.log"
        async with _running("demo_model.random_model", [str(model)], log) as builder:
            if await builder.process.wait():
                raise builder.ended()
    return model


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for sockets and logs that nobody else can look into; stays when something broke."""
    folder = Path(tempfile.mkdtemp(prefix="stack-", dir=_runtime_folder()))
    try:
        yield folder
    except (InternalError, Unavailable) as error:
        error.add_note(f"the logs of the embedded services are in {folder}")
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _runtime_folder() -> Path:
    """The user's folder for such things, if it is ours and leaves room for a socket's name."""
    with contextlib.suppress(OSError):
        with warnings.catch_warnings(action="ignore"):  # of having to fall back to /tmp
            folder = platformdirs.user_runtime_path("zimage")
        longest = len(os.fsencode(folder / "stack-xxxxxxxx" / "encoder.sock"))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and longest <= _LONGEST_SOCKET_PATH:
            return folder
    return Path(tempfile.gettempdir())


def _refuse_what_cannot_work() -> None:
    if sys.platform == "win32":
        raise NotReady(
            "the embedded stack does not run on Windows yet; start the services elsewhere and give "
            "--server ADDR",
            reason="EMBEDDED_ON_WINDOWS",
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotReady(
            f"the embedded stack needs {', '.join(missing)}; install it with\n"
            "  pip install 'zimage-grpc[encoder,dit]'\n"
            "or give --server ADDR to use a service that runs elsewhere",
            reason="EXTRAS_MISSING",
            fields={"missing": ", ".join(missing)},
        )
