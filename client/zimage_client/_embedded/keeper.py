"""The process that keeps a warm stack: it starts the services, and ends them when the file `stop`
appears, when nobody has used them for long enough, or when one of them ends by itself."""

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from zimage_client._embedded import stack, warm
from zimage_client._embedded.children import last_words
from zimage_client._embedded.locks import Lock
from zimage_core.errors import InternalError, ZImageError

_POLL_SECONDS = 0.5


def main() -> int:
    """Runs until the stack has ended; the lock `alive` is inherited under the number given."""
    folder, alive = Path(sys.argv[1]), int(sys.argv[2])
    try:
        asyncio.run(_keep(folder, alive))
    except ZImageError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


async def _keep(folder: Path, alive: int) -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    serving = asyncio.create_task(_serve(folder, alive))
    endings = [asyncio.create_task(told.wait()), asyncio.create_task(_unwanted(folder))]
    await asyncio.wait([serving, *endings], return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, *endings):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving  # raises what it ended with, if it ended by itself


async def _serve(folder: Path, alive: int) -> NoReturn:
    """The services inherit the lock as well: the stack is alive as long as one of them is."""
    model = warm.record(folder).model
    async with stack.running(folder, model, kept_open=[alive]) as children:
        waits = {asyncio.create_task(child.process.wait()): child for child in children}
        ended, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        child = waits[ended.pop()]
        raise InternalError(f"{child.module} ended; its last words:\n{last_words(child.log)}")


async def _unwanted(folder: Path) -> None:
    """Returns when the stack shall end. From then on this process has the lock of the users: a
    command that comes now waits and starts another."""
    last_use = time.monotonic()
    while not (folder / "stop").exists():
        await asyncio.sleep(_POLL_SECONDS)
        nobody = Lock.taken(folder / "users")
        limit = warm.record(folder).idle_seconds
        now = time.monotonic()
        if nobody is None:
            last_use = now
        elif limit is not None and now - last_use >= limit:
            return
        else:
            nobody.release()


if __name__ == "__main__":
    sys.exit(main())
