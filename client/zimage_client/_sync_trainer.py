"""The synchronous client of a trainer service: the asynchronous one, on the same event loop as that
of the other synchronous client."""

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Unpack

from zimage_client._jobs import CacheKind, JobEvent, TrainForecast, TrainJob
from zimage_client._sync import Face, iterate
from zimage_client._trainer import AsyncTrainer
from zimage_core.tls import Credentials
from zimage_rpc.trainer.v1 import trainer_pb2


class Trainer(Face):
    """As AsyncTrainer, for code without an event loop. May be used from several threads."""

    def __init__(self, address: str, **credentials: Unpack[Credentials]) -> None:
        self._trainer = AsyncTrainer(address, **credentials)
        super().__init__(self._trainer)

    def put_blob(self, file: str | Path) -> str:
        """Sends a file to the trainer's store, unless it is there; its SHA-256 names it."""
        return self._work.run(self._trainer.put_blob(file))

    def find_blobs(self, digests: Iterable[str]) -> set[str]:
        """Those that the trainer has."""
        return self._work.run(self._trainer.find_blobs(digests))

    def get_blob(self, sha256: str, file: str | Path) -> None:
        """Writes a file of the trainer's store, such as a checkpoint's."""
        self._work.run(self._trainer.get_blob(sha256, file))

    def plan(self, spec: trainer_pb2.TrainJobSpec) -> TrainForecast:
        """What a job would be, take and last, as of AsyncTrainer."""
        return self._work.run(self._trainer.plan(spec))

    def train(self, spec: trainer_pb2.TrainJobSpec) -> TrainJob:
        """Begins a job with what was put before."""
        return self._work.run(self._trainer.train(spec))

    def get(self, job: str) -> TrainJob:
        """A job as it is."""
        return self._work.run(self._trainer.get(job))

    def jobs(self) -> list[TrainJob]:
        """All, the latest first."""
        return self._work.run(self._trainer.jobs())

    def watch(self, job: str, *, only_past: bool = False) -> Generator[JobEvent, None, None]:
        """What has happened to a job, then what happens, as AsyncTrainer's does."""
        return iterate(self, self._work, self._trainer.watch(job, only_past=only_past))

    def pause(self, job: str) -> TrainJob:
        """Lets it rest behind its next checkpoint, which is made soon."""
        return self._work.run(self._trainer.pause(job))

    def resume(self, job: str) -> TrainJob:
        """Lets one that rests or failed go on from its last checkpoint."""
        return self._work.run(self._trainer.resume(job))

    def cancel(self, job: str) -> TrainJob:
        """Ends it for good; its checkpoints stay."""
        return self._work.run(self._trainer.cancel(job))

    def delete(self, job: str) -> None:
        """Takes away one that has ended, with its checkpoints."""
        self._work.run(self._trainer.delete(job))

    def cache(self) -> list[CacheKind]:
        """What the trainer keeps of captions and pictures."""
        return self._work.run(self._trainer.cache())

    def verify_cache(self) -> Generator[tuple[int, list[str]], None, None]:
        """Has all of it read, as AsyncTrainer's does."""
        return iterate(self, self._work, self._trainer.verify_cache())

    def prune_cache(
        self, unused_seconds: float | None = None, most_bytes: int | None = None
    ) -> list[CacheKind]:
        """Takes away what was not used for so long, and the longest unused until the rest takes so
        many bytes; 30 days if nothing is said. What is gone."""
        return self._work.run(self._trainer.prune_cache(unused_seconds, most_bytes))
