"""Stacks that outlive the command that started them, shared by all commands of one user.

Each lives in a folder of its own, named by version and model, under a keeper process. Three locks
tell how it is: `starting` is held by the command that starts it, `alive` by the keeper and its
services, `users` by every command that uses it.
"""

import asyncio
import contextlib
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
    def is_ending(self) -> bool:
        """Whether somebody said `down`, be it done or not."""
        return (self.folder / "stop").exists()

    @property
    def stays(self) -> bool:
        """Whether it was started by `up`."""
        return record(self.folder).idle_seconds is None


def record(folder: Path) -> Record:
    """What a folder says of its stack; raises OSError, KeyError or ValueError where it says
    nothing that this version understands."""
    values = json.loads((folder / "stack.json").read_bytes())
    return Record(Path(values["model"]), values["idle_seconds"])


def running_stacks() -> list[WarmStack]:
    """All stacks of this user that are alive, of whatever version."""
    return [stack for stack in _recorded_stacks() if stack.is_alive]


def chosen() -> WarmStack | None:
    """The stack of an explicit `up`; raises NotReady for one that is not what it was then."""
    found = [stack for stack in _recorded_stacks() if stack.stays and not stack.is_ending]
    if not found:
        return None
    stack = next((stack for stack in found if stack.is_alive), found[0])
    if not stack.is_alive:
        what = "has ended by itself; its logs are in " + str(stack.folder)
    elif stack.folder != folders.stack_folder(stack.model):
        what = "is of another version, or from before the files there were changed"
    else:
        return stack
    raise NotReady(
        f"the stack that was started with {stack.model} {what}; start it anew with zimage-client "
        f"up --model {stack.model}, or say zimage-client down",
        reason="STALE_STACK",
        fields={"model": str(stack.model)},
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
    with await _locked(folders.runtime_folder() / "up", say, "another `up` is under way"):
        for other in _recorded_stacks():
            if other.stays and other.folder != stack.folder:
                await down(other, say)
        with await _in_use(stack, say):
            _write(stack, idle_seconds=None)  # its keeper reads this now and then
    return stack


async def down(stack: WarmStack, say: Say) -> None:
    """Ends a stack; requests under way get the grace of its services."""
    (stack.folder / "stop").touch()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            while stack.is_alive:
                say(f"stopping the stack with {stack.model}")
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise InternalError(
            f"the stack in {stack.folder} does not end; its logs are there",
            reason="EMBEDDED_STACK",
            fields={"folder": str(stack.folder)},
        ) from None


async def down_all(say: Say) -> list[WarmStack]:
    """Ends every stack, and forgets those that ended by themselves; returns the others."""
    alive = running_stacks()
    for stack in _recorded_stacks():
        await down(stack, say)
    return alive


def _recorded_stacks() -> list[WarmStack]:
    if sys.platform == "win32":
        return []
    found = []
    for path in folders.runtime_folder().glob("*/stack.json"):
        with contextlib.suppress(OSError, KeyError, ValueError, TypeError):  # of another version
            found.append(WarmStack(path.parent, record(path.parent).model))
    return found


def _stack(model: Path) -> WarmStack:
    refuse_what_cannot_work()
    folders.sweep()
    return WarmStack(folders.stack_folder(model), model.resolve())


async def _in_use(stack: WarmStack, say: Say) -> Lock:
    """The lock of a user of the stack, which serves by then."""
    starting = await _locked(
        stack.folder / "starting", say, "another command starts the embedded services"
    )
    with starting:
        while True:
            alive = Lock.taken(stack.folder / "alive")
            if alive is not None:
                with alive:
                    say("starting the embedded services")
                    _start_keeper(stack, alive)
            elif stack.is_ending:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            using = Lock.taken(stack.folder / "users", shared=True)
            if using is None:  # it is about to end
                await asyncio.sleep(_POLL_SECONDS)
                continue
            try:
                if await _serves(stack):
                    return using
            except BaseException:
                using.release()
                if alive is not None:  # nobody else waits for it
                    (stack.folder / "stop").touch()
                raise
            using.release()
            if alive is not None:
                raise _ended(stack)


async def _locked(path: Path, say: Say, while_waiting: str) -> Lock:
    lock = Lock.taken(path)
    while lock is None:
        say(while_waiting)
        await asyncio.sleep(_POLL_SECONDS)
        lock = Lock.taken(path)
    return lock


def _write(stack: WarmStack, idle_seconds: float | None) -> None:
    values = {"model": str(stack.model), "idle_seconds": idle_seconds}
    write_whole(stack.folder / "stack.json", json.dumps(values).encode())


def _start_keeper(stack: WarmStack, alive: Lock) -> None:
    (stack.folder / "stop").unlink(missing_ok=True)
    _write(stack, IDLE_SECONDS)
    module = "zimage_client._embedded.keeper"
    with (stack.folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(stack.folder), str(alive.descriptor)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            pass_fds=[alive.descriptor],
        )
    _keepers.append(keeper)


async def _serves(stack: WarmStack) -> bool:
    """Waits until both services are ready; False when the stack ends before."""
    at = stack.addresses
    async with AsyncClient(at.server, at.encoder) as client:
        while not (await is_ready(client.describe_encoder) and await is_ready(client.describe)):
            if not stack.is_alive:
                return False
            await asyncio.sleep(_POLL_SECONDS)
    return True


def _ended(stack: WarmStack) -> InternalError:
    return InternalError(
        f"the embedded stack ended while it started; its last words:\n"
        f"{last_words(stack.folder / 'keeper.log')}\n"
        f"the logs of the embedded services are in {stack.folder}",
        reason="EMBEDDED_STACK",
        fields={"folder": str(stack.folder)},
    )
