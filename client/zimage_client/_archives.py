"""Checkpoints of a trainer's jobs as files, and back."""

import asyncio
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import Any

from zimage_client._jobs import TrainCheckpoint, TrainJob, TrainStep
from zimage_client._trainer import AsyncTrainer
from zimage_core.errors import NotFound
from zimage_core.formats import checkpoint_zip
from zimage_core.formats.checkpoint_zip import DATASET, WEIGHTS, Told, state_name
from zimage_core.wire import plain
from zimage_rpc.trainer.v1 import trainer_pb2
from zimage_rpc.types.v1 import types_pb2

_NOT_KEPT = ("dataset", "start", "replaces_adapter")
"""Of a spec: what a file says otherwise, and what is for once."""


async def save(trainer: AsyncTrainer, job: TrainJob, kept: TrainCheckpoint, file: Path) -> None:
    """Writes a checkpoint with all that training goes on from."""
    losses = {}
    async with aclosing(trainer.watch(job.id, only_past=True)) as events:
        async for event in events:
            if isinstance(event, TrainStep) and event.step < kept.step:
                losses[event.step] = event.loss
    config = plain.values(job.spec)
    for name in _NOT_KEPT:
        config.pop(name, None)
    if not kept.state:
        raise NotFound(
            f"of step {kept.step} the weights alone are kept; kept_state_count says of how many "
            "checkpoints training can go on from"
        )
    digests = {WEIGHTS: kept.weights.sha256, DATASET: job.spec.dataset.sha256}
    digests |= {state_name(number): part.sha256 for number, part in enumerate(kept.state)}
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        files = {name: Path(scratch) / name for name in digests}
        for name, sha256 in digests.items():
            await trainer.get_blob(sha256, files[name])
        told = Told(kept.step, config, losses)
        await asyncio.to_thread(checkpoint_zip.write, file, told, files)


async def send(
    trainer: AsyncTrainer, file: Path
) -> tuple[dict[str, Any], trainer_pb2.TrainCheckpoint, types_pb2.Digest]:
    """Gives a trainer what a file holds: the values of its job, what it goes on from, and what it
    learns from."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        told = await asyncio.to_thread(checkpoint_zip.read, file, Path(scratch))
        digests = {}
        for name in told.files:
            path = Path(scratch) / name
            sha256 = await trainer.put_blob(path)
            digests[name] = types_pb2.Digest(sha256=sha256, size_bytes=path.stat().st_size)
    dataset, weights = digests.pop(DATASET), digests.pop(WEIGHTS)
    state = [digests[state_name(number)] for number in range(len(digests))]
    start = trainer_pb2.TrainCheckpoint(step=told.step, weights=weights, state=state)
    return dict(told.config), start, dataset
