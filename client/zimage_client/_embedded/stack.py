"""Both services of a stack, started and stopped together."""

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from zimage_client._client import AsyncClient
from zimage_client._embedded import children
from zimage_client._embedded.children import Child
from zimage_client._embedded.folders import runtime_folder, sweep
from zimage_client._embedded.locks import Lock
from zimage_core.errors import InternalError, NotReady, Unavailable

_NEEDED = ("torch", "transformers", "diffusers", "tokenizers", "grpc_health")
_GRACE_SECONDS = 2

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services of a stack listen."""

    server: str
    """Empty without a DiT."""
    encoder: str


def addresses_in(folder: Path) -> Addresses:
    """Those of the stack in a folder."""
    return Addresses(f"unix:{folder / 'dit.sock'}", f"unix:{folder / 'encoder.sock'}")


@asynccontextmanager
async def brief_stack(
    say: Say,
    *,
    model: Path | None = None,
    dit: bool = True,
    flags: Sequence[str] = (),
    dit_flags: Sequence[str] = (),
) -> AsyncIterator[Addresses]:
    """A stack that lives as long as the block, with the demo model unless told otherwise; `say`
    hears what goes on until it serves, both services get the flags."""
    refuse_what_cannot_work()
    with _private_folder() as folder:
        say("starting the embedded services")
        async with running(
            folder, model or demo_model(), dit=dit, flags=flags, dit_flags=dit_flags
        ):
            yield addresses_in(folder)


@asynccontextmanager
async def running(
    folder: Path,
    model: Path,
    *,
    dit: bool = True,
    flags: Sequence[str] = (),
    dit_flags: Sequence[str] = (),
    kept_open: Sequence[int] = (),
) -> AsyncIterator[list[Child]]:
    """The services while the block runs, which begins when they serve."""
    at = addresses_in(folder)
    async with AsyncExitStack() as closing:

        async def start(module: str, address: str, *more: str) -> Child:
            given = [*_flags(model, address), *flags, *more]
            child = children.running(module, given, folder / f"{module}.log", kept_open)
            return await closing.enter_async_context(child)

        async with AsyncClient(at.server, at.encoder) as client:
            started = [(await start("encoder_service", at.encoder), client.describe_encoder)]
            if dit:
                child = await start("dit_service", at.server, "--encoder", at.encoder, *dit_flags)
                started.append((child, client.describe))  # type: ignore[arg-type]
            for child, describe in started:
                await child.serves(describe)
        yield [child for child, _ in started]


def demo_model() -> Path:
    """The small trained model that comes with this package."""
    return Path(str(files("demo_model") / "zimage-demo"))


def refuse_what_cannot_work() -> None:
    """Raises NotReady where no stack can run."""
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


def _flags(model: Path, address: str) -> list[str]:
    """What the user's settings say of services is not meant for these."""
    where = ["--isolated", "--listen", address, "--probes", ""]
    return [
        *where,
        "--model",
        str(model),
        "--exit-with-stdin",
        "--grace-seconds",
        str(_GRACE_SECONDS),
    ]


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for sockets and logs that nobody else can look into; stays when something broke."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix="stack-", dir=runtime_folder()))
    alive = Lock.taken(folder / "alive")  # so that no sweep takes it away
    assert alive is not None
    try:
        with alive:
            yield folder
    except (InternalError, Unavailable) as error:
        error.add_note(f"the logs of the embedded services are in {folder}")
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
