"""What lies in the store under names of the trainer's, looked after: how much there is, whether it
is what it should be, and what may go."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from trainer_service.caches import CAPTIONS, LATENTS
from trainer_service.jobs.jobs import Job, Jobs, Kept
from zimage_core.digests import Named
from zimage_core.errors import InvalidRequest, NotFound
from zimage_core.formats import dataset_file
from zimage_core.store import blobs as stores
from zimage_core.store.blobs import Blobs

CHECKPOINTS, DATASETS, PICTURES, SAMPLES = "checkpoints", "datasets", "pictures", "samples"
"""Kinds of names beside those of caches."""
BESIDE, START = "beside", "start"
"""Parts of names in checkpoints that a job was given."""

_CACHES = (CAPTIONS, LATENTS)
_PAGE_SECONDS = 2.0
_PAGE_COUNT = 1000


@dataclass(frozen=True, slots=True)
class Heap:
    """So much of one kind."""

    kind: str
    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Page:
    """Some of what is kept, looked at."""

    count: int
    torn: list[str]
    """Kinds and names of what is gone."""
    last: str
    """Where to go on; empty where there is no more."""


def heaps(blobs: Blobs) -> list[Heap]:
    """All that is kept of what was encoded or sent."""
    return [_heap(kind, list(blobs.kept(kind))) for kind in (*_CACHES, PICTURES)]


def verify(blobs: Blobs, behind: str) -> Page:
    """Reads what is cached behind a name, as much as goes in a short time; what is not what it
    should be goes."""
    until = time.monotonic() + _PAGE_SECONDS
    names = [f"{kind}/{name}" for kind in _CACHES for name in blobs.names(kind)]
    if behind and behind.partition("/")[0] not in _CACHES:
        raise InvalidRequest.given("page_token", behind[:100], "that of the page before", "TOKEN")
    left = [name for name in names if name > behind]
    torn = []
    count = 0
    for name in left[:_PAGE_COUNT]:
        if not _is_whole(blobs, *name.split("/")):
            blobs.forget(*name.split("/"))
            torn.append(name)
        count += 1
        if time.monotonic() > until:
            break
    return Page(count, torn, left[count - 1] if count < len(left) else "")


def prune(blobs: Blobs, jobs: Jobs, unused_seconds: float, most_bytes: int | None) -> list[Heap]:
    """Takes away the names of what was not used for so long, or the longest ago of too much, and
    those that belong to no job; says of what. No job may be given names meanwhile."""
    old = _old(blobs, time.time() - unused_seconds, math.inf if most_bytes is None else most_bytes)
    there = jobs.ids()
    strays = {
        **{
            kind: [one for one in blobs.kept(kind) if _job(one.name) not in there]
            for kind in (CHECKPOINTS, SAMPLES)
        },
        DATASETS: [one for one in blobs.kept(DATASETS) if one.name not in there],
    }
    wanted = set(_pictures_of_datasets(blobs, there))
    strays[PICTURES] = [one for one in blobs.kept(PICTURES) if one.name not in wanted]
    gone = old | strays
    for kind, all_kept in gone.items():
        for kept in all_kept:
            blobs.forget(kind, kept.name)
    return [_heap(kind, all_kept) for kind, all_kept in gone.items()]


def _old(blobs: Blobs, since: float, most_bytes: float) -> dict[str, list[stores.Kept]]:
    """Of what was encoded, by its kinds: what was not used since then, and so much more that the
    rest takes no more than so many bytes."""
    latest_first = sorted(
        ((kept, kind) for kind in _CACHES for kept in blobs.kept(kind)),
        key=lambda one: one[0].used,
        reverse=True,
    )
    old: dict[str, list[stores.Kept]] = {kind: [] for kind in _CACHES}
    total = 0
    for kept, kind in latest_first:
        total += kept.size_bytes
        if kept.used < since or total > most_bytes:
            old[kind].append(kept)
    return old


def forget_job(blobs: Blobs, job: str) -> None:
    """Takes away the names of its files."""
    blobs.forget(DATASETS, job)
    for kind in (CHECKPOINTS, SAMPLES):
        for name in blobs.names(kind):
            if _job(name) == job:
                blobs.forget(kind, name)


def forget_thinned(blobs: Blobs, job: Job) -> None:
    """Takes away the names of what a job's checkpoints have no more."""
    wanted = {name for kept in job.checkpoints for name, _ in checkpoint_files(job.id, kept)}
    for name in blobs.names(CHECKPOINTS):
        is_thinned = name not in wanted and not name.endswith((BESIDE, START))
        if _job(name) == job.id and is_thinned:
            blobs.forget(CHECKPOINTS, name)


def checkpoint_files(job: str, kept: Kept) -> Iterator[tuple[str, Named]]:
    """Those of a checkpoint, by the names that they have; what it is whole with comes last."""
    for number, part in enumerate(kept.state):
        yield file_name(job, kept.step, f"state{number}"), part
    yield file_name(job, kept.step, "weights"), kept.weights


def _pictures_of_datasets(blobs: Blobs, jobs: set[str]) -> Iterator[str]:
    for kept in blobs.kept(DATASETS):
        if kept.name in jobs:
            with suppress(NotFound, InvalidRequest), blobs.open(kept.sha256) as file:
                for example in dataset_file.load(file.read()):
                    yield from example.files


def _is_whole(blobs: Blobs, kind: str, name: str) -> bool:
    try:
        return blobs.verify(blobs.pointed_at(kind, name))
    except (NotFound, InvalidRequest):
        return False


def _heap(kind: str, kept: list[stores.Kept]) -> Heap:
    return Heap(kind, len(kept), sum(one.size_bytes for one in kept))


def file_name(job: str, step: int, part: object) -> str:
    """The name of a file of a checkpoint, or of a picture that was drawn with it."""
    return f"{job}-{step}-{part}"


def _job(name: str) -> str:
    """Whose such a file is."""
    return name.rsplit("-", 2)[0]
