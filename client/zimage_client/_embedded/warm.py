"""Stacks that outlive the command that started them, shared by all commands of one user.

Each lives in a folder of its own, named by version and model, under a keeper process. Three locks
tell how it is: `starting` is held by the command that starts it, `alive` by the keeper and its
services, `users` by every command that uses it.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from zimage_client._client import AsyncClient
from zimage_client._embedded import folders
from zimage_client._embedded.children import is_ready, last_words
from zimage_client._embedded.locks import Lock, is_held
from zimage_client._embedded.stack import Addresses, Say, addresses_in, refuse_what_cannot_work
from zimage_core.errors import InternalError, NotReady
from zimage_core.files import write_whole

IDLE_SECONDS = 600.0
"""How long a stack that nobody asked to stay waits for another command."""

_POLL_SECONDS = 0.1
_STOP_SECONDS = 60.0

_keepers: list[subprocess.Popen[bytes]] = []
"""Those that this process started: a Popen that is forgotten while its child runs complains."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a folder says of its stack."""

    model: Path
    idle_seconds: float | None
    """None for one that stays until `down`."""


@dataclass(frozen=True, slots=True)
class WarmStack:
    """The stack of a folder."""

    folder: Path
    model: Path

    @property
    def addresses(self) -> Addresses:
        """Where its services listen."""
        return addresses_in(self.folder)

    @property
    def is_alive(self) -> bool:
        """Whether any of its processes is."""
        return is_held(self.folder / "alive")

    @property
    def stays(self) -> bool:
        """Whether it was started by `up`."""
        return record(self.folder).idle_seconds is None


def record(folder: Path) -> Record:
    """What a folder says of its stack."""
    values = json.loads((folder / "stack.json").read_bytes())
    return Record(Path(values["model"]), values["idle_seconds"])


def running_stacks() -> list[WarmStack]:
    """All stacks of this user that are alive, of whatever version."""
    if sys.platform == "win32":
        return []
    folders_found = (path.parent for path in folders.runtime_folder().glob("*/stack.json"))
    stacks = (WarmStack(folder, record(folder).model) for folder in folders_found)
    return [stack for stack in stacks if stack.is_alive]


def chosen() -> WarmStack | None:
    """The stack of an explicit `up`; raises NotReady for one that is not what it was then."""
    found = next((stack for stack in running_stacks() if stack.stays), None)
    if found is None or found.folder == folders.stack_folder(found.model):
        return found
    raise NotReady(
        f"the stack that is up with {found.model} is of another version, or from before the files "
        f"there were changed; start it anew: zimage-client up --model {found.model}",
        reason="STALE_STACK",
        fields={"model": str(found.model)},
    )


@asynccontextmanager
async def used(model: Path, say: Say) -> AsyncIterator[WarmStack]:
    """The model's stack, started if need be; it does not fall idle while the block runs."""
    stack = _stack(model)
    with await _in_use(stack, say):
        yield stack


async def up(model: Path, say: Say) -> WarmStack:
    """A stack that stays until `down`; another one that stays ends first."""
    stack = _stack(model)
    for other in running_stacks():
        if other.stays and other.folder != stack.folder:
            await down(other, say)
    with await _in_use(stack, say):
        _write(stack, idle_seconds=None)  # its keeper reads this now and then
    return stack


async def down(stack: WarmStack, say: Say) -> None:
    """Ends a stack; requests under way get the grace of its services."""
    say(f"stopping the stack with {stack.model}")
    (stack.folder / "stop").touch()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            while stack.is_alive:  # noqa: ASYNC110 - no event crosses processes
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise InternalError(
            f"the stack in {stack.folder} does not end; its logs are there",
            reason="EMBEDDED_STACK",
            fields={"folder": str(stack.folder)},
        ) from None


def _stack(model: Path) -> WarmStack:
    refuse_what_cannot_work()
    return WarmStack(folders.stack_folder(model), model.resolve())


async def _in_use(stack: WarmStack, say: Say) -> Lock:
    """The lock of a user of the stack, which serves by then."""
    starting = Lock.taken(stack.folder / "starting")
    while starting is None:
        say("another command starts the embedded services")
        await asyncio.sleep(_POLL_SECONDS)
        starting = Lock.taken(stack.folder / "starting")
    with starting:
        while True:
            alive = Lock.taken(stack.folder / "alive")
            if alive is not None:
                with alive:
                    say("starting the embedded services")
                    _start_keeper(stack, alive)
            using = Lock.taken(stack.folder / "users", shared=True)
            if using is not None:
                break
            await asyncio.sleep(_POLL_SECONDS)  # it is about to end
        try:
            await _serves(stack)
        except BaseException:
            using.release()
            raise
        return using


def _write(stack: WarmStack, idle_seconds: float | None) -> None:
    values = {"model": str(stack.model), "idle_seconds": idle_seconds}
    write_whole(stack.folder / "stack.json", json.dumps(values).encode())


def _start_keeper(stack: WarmStack, alive: Lock) -> None:
    (stack.folder / "stop").unlink(missing_ok=True)
    _write(stack, IDLE_SECONDS)
    module = "zimage_client._embedded.keeper"
    with (stack.folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", module, str(stack.folder), str(alive.descriptor)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            pass_fds=[alive.descriptor],
        )
    _keepers.append(keeper)


async def _serves(stack: WarmStack) -> None:
    """Waits until both services are ready; raises InternalError when the stack ends before."""
    at = stack.addresses
    async with AsyncClient(at.server, at.encoder) as client:
        while not (await is_ready(client.describe_encoder) and await is_ready(client.describe)):
            if not stack.is_alive:
                raise InternalError(
                    f"the embedded stack ended while it started; its last words:\n"
                    f"{last_words(stack.folder / 'keeper.log')}\n"
                    f"the logs of the embedded services are in {stack.folder}",
                    reason="EMBEDDED_STACK",
                    fields={"folder": str(stack.folder)},
                )
            await asyncio.sleep(_POLL_SECONDS)
