"""Services as child processes. Each ends when its standard input does, so that not even kill -9 of
this process leaves one behind; each has a session of its own, so that Ctrl-C never reaches it."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from zimage_client._description import DitDescription, EncoderDescription
from zimage_core.errors import DeadlineTooShort, InternalError, Unavailable

_POLL_SECONDS = 0.1
_DESCRIBE_SECONDS = 1.0
_STOP_SECONDS = 10.0
_LOG_LINES_SHOWN = 15

Describe = Callable[..., Awaitable[DitDescription | EncoderDescription]]


@dataclass(frozen=True, slots=True)
class Child:
    """A child process with its log."""

    module: str
    process: Process
    log: Path

    async def serves(self, describe: Describe) -> None:
        """Waits until the service is ready; raises InternalError when it ends before."""

        async def ready() -> None:
            while not await is_ready(describe):  # noqa: ASYNC110 - no event crosses processes
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
        code = self.process.returncode
        return InternalError(
            f"{self.module} ended with exit code {code} while it started; its last words:\n"
            f"{last_words(self.log)}",
            reason="EMBEDDED_STACK",
            fields={"log": str(self.log), "exit_code": str(code)},
        )


async def is_ready(describe: Describe) -> bool:
    """Whether a service says that it is."""
    with contextlib.suppress(Unavailable, DeadlineTooShort):
        return (await describe(timeout=_DESCRIBE_SECONDS)).ready
    return False


def last_words(log: Path) -> str:
    """The end of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LOG_LINES_SHOWN:])


@asynccontextmanager
async def running(
    module: str, arguments: Sequence[str], log: Path, kept_open: Sequence[int] = ()
) -> AsyncIterator[Child]:
    """A child process that runs while the block does; it inherits the descriptors `kept_open`."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # or files in the user's folder could pass for modules
            "-m",
            module,
            *arguments,
            stdin=PIPE,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
            pass_fds=kept_open,
        )
    try:
        yield Child(module, process, log)
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
