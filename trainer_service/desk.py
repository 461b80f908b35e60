"""What all jobs of a trainer work with, and what they have in common."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from trainer_service.caches import Caches, loading
from trainer_service.jobs.jobs import Jobs, Kept
from zimage_client import AsyncClient, DitDescription
from zimage_core.errors import DeadlineTooShort, Overloaded, Unavailable, ZImageError
from zimage_core.store.blobs import Blobs
from zimage_rpc.trainer.v1.trainer_pb2 import TrainJobSpec

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 5.0
STORE_FULL = "STORE_FULL"
_PASSING = ("QUEUE_FULL", "RATE_LIMITED", STORE_FULL)
"""Of what is too much now, what may not be later."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Desk:
    """What all jobs of a trainer work with."""

    jobs: Jobs
    blobs: Blobs
    client: AsyncClient
    """Of the encoder, and of all DiT services, whichever answers."""
    dits: tuple[AsyncClient, ...]
    """Of each DiT service alone: what a session made lies there."""
    caches: Caches
    threads: ThreadPoolExecutor
    learning: Counter[AsyncClient] = field(default_factory=Counter)
    """How many jobs are at each DiT service."""
    places: dict[str, AsyncClient] = field(default_factory=dict)
    """Where jobs learnt last: what is left of a stretch is there."""

    async def aside(self, work: Callable[[], T]) -> T:
        """What waits for disks."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


class Listener(Protocol):
    """Hears how a stretch goes."""

    async def runs(self, job: str) -> None:
        """It learns now."""

    async def waits(self, job: str, error: ZImageError) -> None:
        """It has to wait for somebody who is away."""

    def rests(self, job: str, why: str) -> None:
        """It shall rest behind its next checkpoint."""

    def ring(self, job: str) -> None:
        """There is news of it."""


def is_passing(error: ZImageError) -> bool:
    """Whether it is worth to wait: somebody is away, busy or slow."""
    is_busy = isinstance(error, Overloaded) and error.reason in _PASSING
    return is_busy or isinstance(error, Unavailable | DeadlineTooShort)


def pause_seconds(failures: int) -> float:
    """Until the next try, after so many that failed in a row."""
    longest = min(_FIRST_PAUSE_SECONDS * 2.0**failures, _LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - so that jobs do not come in step


def base_model(dit: DitDescription) -> str:
    """The model of a DiT service, as people call it; empty while it is loaded."""
    return f"{dit.model.name} ({dit.model.variant})" if dit.model else ""


def obstacle_to(spec: TrainJobSpec, dit: DitDescription) -> ZImageError | None:
    """Why a job does not learn at such a service; None where it may."""
    wanted, there = spec.base_model, base_model(dit)
    if dit.model is None or not dit.ready:
        return loading("the model")
    if wanted not in ("", there):
        said = f"the DiT service has {there}, and the job learns on {wanted}"
        return Unavailable(said, reason="ANOTHER_MODEL")
    if dit.model.full_training != spec.training.full:
        kind = "adapters" if spec.training.full else "the model itself, in full,"
        return Unavailable(f"the DiT service learns {kind} alone", reason="ANOTHER_KIND")
    return None


async def suited(desk: Desk, spec: TrainJobSpec) -> tuple[AsyncClient, DitDescription]:
    """A DiT service at which such a job may learn, as it is now; whichever answers where there is
    none."""
    for client in desk.dits:
        with suppress(ZImageError):
            found = await client.describe()
            if obstacle_to(spec, found) is None:
                return client, found
    return desk.client, await desk.client.describe()


async def publish(desk: Desk, name: str, kept: Kept) -> None:
    """Lets everybody draw with a checkpoint by that name, at each DiT service that is there; raises
    what went wrong where none is."""
    file = await desk.aside(lambda: desk.blobs.local(kept.weights.sha256))
    errors = []
    for client in desk.dits:
        try:
            await client.add_adapter(name, file, replace=True)
        except ZImageError as error:
            errors.append(error)
    if len(errors) == len(desk.dits):
        raise errors[0]
