"""`zimage-client train`: pictures and captions in, a LoRA out, by a job that goes on without us."""

import asyncio
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from zimage_client import AsyncTrainer
from zimage_client._dataset import Dataset, folder
from zimage_client.cli import jobs
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.formats import dataset_file
from zimage_core.settings import ClientSettings
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2
from zimage_rpc.types.v1 import types_pb2

_LEAST_SIDE_PX = 64
_USUAL_STEPS = 1500


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    data = parser.add_argument_group("what is learnt from")
    data.add_argument(
        "--images", type=Path, metavar="DIR", help="pictures, each with a .txt file beside it"
    )
    data.add_argument(
        "--side", type=int, metavar="PX", help="cut pictures to about so many pixels squared"
    )
    data.add_argument(
        "--caption-dropout", type=float, metavar="SHARE", help="how often captions are left out"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--name", metavar="NAME", help="of the adapter; default: that of the folder")
    how.add_argument("--rank", type=int, metavar="N", help="default: 16")
    how.add_argument("--steps", type=int, metavar="N", help=f"default: {_USUAL_STEPS}")
    how.add_argument("--batch-size", type=int, metavar="N", help="default: 1")
    how.add_argument("--learning-rate", type=float, metavar="RATE", help="default: 1e-4")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    how.add_argument(
        "--checkpoint-interval", type=int, metavar="STEPS", help="between checkpoints; default: 250"
    )
    parser.add_argument("--detach", action="store_true", help="do not watch it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int | None:
    """Looks at everything, sends what the trainer lacks, then watches."""
    if args.images is None:
        raise wrong("--images", "give the folder of pictures, --images DIR")
    async with jobs.trainer(settings) as trainer:
        terminal.live(f"looking at {args.images}")
        dataset = await asyncio.to_thread(folder, args.images, _LEAST_SIDE_PX)
        dataset.check()
        again = dataset.duplicate_count
        terminal.note(
            f"{len(dataset.examples)} pictures" + (f", {again} of them again" if again else "")
        )
        spec = _spec(args)
        spec.dataset.CopyFrom(await _sent(trainer, dataset, terminal))
        job = await trainer.train(spec)
        terminal.note(f"job {job.id}: {job.step_count} steps, {job.name}")
        if args.detach:
            terminal.result(job.id)
            return None
        return await jobs.watch(trainer, job.id, args, terminal)


async def _sent(trainer: AsyncTrainer, dataset: Dataset, terminal: Terminal) -> types_pb2.Digest:
    there = await trainer.find_blobs(dataset.paths)
    lacking = [path for sha256, path in dataset.paths.items() if sha256 not in there]
    for number, path in enumerate(lacking, 1):
        terminal.live(f"sending pictures, {number} of {len(lacking)}")
        await trainer.put_blob(path)
    data = dataset_file.dump(dataset.examples)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "dataset.jsonl"
        file.write_bytes(data)
        sha256 = await trainer.put_blob(file)
    return types_pb2.Digest(sha256=sha256, size_bytes=len(data), media_type=dataset_file.MEDIA_TYPE)


def _spec(args: Namespace) -> trainer_pb2.TrainJobSpec:
    """What the flags ask for; the trainer decides the rest."""
    group = training_pb2.LoraGroup(rank=args.rank)
    return trainer_pb2.TrainJobSpec(
        name=args.name or args.images.resolve().name,
        training=training_pb2.TrainingPlan(
            seed=args.seed,
            step_count=_USUAL_STEPS if args.steps is None else args.steps,
            lora=training_pb2.LoraPlan(groups=[group]),
            learning_rate=training_pb2.LearningRatePlan(peak=args.learning_rate),
        ),
        batch_size=args.batch_size,
        side_px=args.side,
        caption_dropout=args.caption_dropout,
        checkpoint_interval_steps=args.checkpoint_interval,
    )
