"""`zimage-client train`: pictures and captions in, a LoRA out, by a job that goes on without us."""

import asyncio
import json
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path

from zimage_client import AsyncTrainer, TrainJob, _job_file
from zimage_client import _archives as archives
from zimage_client._dataset import Dataset, gather, some
from zimage_client._job_file import Data, Folder, JobFile
from zimage_client.cli import jobs
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.errors import DeadlineTooShort, Unavailable
from zimage_core.formats import dataset_file
from zimage_core.settings import ClientSettings
from zimage_rpc.trainer.v1.trainer_pb2 import TrainJobSpec
from zimage_rpc.types.v1 import types_pb2

_LEAST_SIDE_PX = 64
_OF_SPEC = {
    "name": "name",
    "rank": "training.lora.groups[].rank",
    "full": "training.full",
    "keep": "kept_checkpoint_count",
    "validation": "validation.share",
    "patience": "validation.patience",
    "steps": "training.step_count",
    "batch_size": "batch_size",
    "learning_rate": "training.learning_rate.peak",
    "seed": "training.seed",
    "side": "sides_px",
    "caption_dropout": "caption_dropout",
    "checkpoint_interval": "checkpoint_interval_steps",
    "captions": "captions",
    "replace": "replaces_adapter",
    "sample": "samples.prompts",
    "low_ram": "low_memory",
    "narrow_captions": "narrow_captions",
    "battery": "least_battery_percent",
}
"""Where the flags' values belong."""
_FLAGS = {"job_file": "config"}
"""Whose names are not those of their values."""
_OF_DATA = (
    *("images", "job_file", "masks", "flip", "trigger", "skip_faulty", "epochs"),
    "training_adapter",
)
"""What a checkpoint says already."""


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    add_job_flags(parser)
    jobs.add_samples_flag(parser)
    parser.add_argument("--detach", action="store_true", help="do not watch it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


def add_job_flags(parser: ArgumentParser) -> None:
    """Those that say what a job is."""
    parser.add_argument(
        "--config",
        dest="job_file",
        type=Path,
        metavar="FILE",
        help="the job as a TOML or JSON file; flags go before what it says",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE.zip",
        help="go on from a checkpoint that jobs export --zip wrote",
    )
    data = parser.add_argument_group("what is learnt from")
    data.add_argument(
        "--images",
        type=Path,
        action="append",
        metavar="DIR",
        help="pictures with .txt files beside them or a metadata.jsonl; may be given again",
    )
    data.add_argument(
        "--masks", type=Path, metavar="DIR", help="pictures whose bright parts are learnt"
    )
    data.add_argument("--trigger", metavar="WORD", help="put before every caption")
    data.add_argument("--flip", action="store_true", help="show half of the pictures mirrored")
    data.add_argument(
        "--skip-faulty", action="store_true", help="leave out files that cannot be learnt from"
    )
    data.add_argument(
        "--side",
        type=int,
        action="append",
        metavar="PX",
        help="cut pictures to about so many pixels squared; given again, to each in turn",
    )
    data.add_argument(
        "--caption-dropout", type=float, metavar="SHARE", help="how often captions are left out"
    )
    data.add_argument(
        "--captions",
        choices=("stream", "all-first"),
        help="when to encode captions and pictures; default: stream, while others are learnt",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--name", metavar="NAME", help="of the adapter; default: that of the folder")
    how.add_argument(
        "--replace", action="store_true", default=None, help="replace an adapter of that name"
    )
    how.add_argument(
        "--sample",
        action="append",
        metavar="PROMPT",
        help="draw it with each checkpoint; may be given again",
    )
    how.add_argument(
        "--training-adapter",
        type=Path,
        metavar="FILE",
        help="a LoRA that is active while training alone, such as one that undoes a distillation",
    )
    how.add_argument(
        "--full",
        action="store_true",
        default=None,
        help="learn the transformer itself, at a DiT service of its own",
    )
    how.add_argument("--rank", type=int, metavar="N", help="default: 16")
    how.add_argument("--steps", type=int, metavar="N", help=f"default: {_job_file.USUAL_STEPS}")
    how.add_argument("--epochs", type=int, metavar="N", help="in the place of --steps")
    how.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="default: 1; auto: as many as the DiT service has room for at once",
    )
    how.add_argument("--learning-rate", type=float, metavar="RATE", help="default: 1e-4")
    how.add_argument("--seed", type=int, metavar="N", help="default: 0")
    how.add_argument(
        "--checkpoint-interval", type=int, metavar="STEPS", help="between checkpoints; default: 250"
    )
    how.add_argument(
        "--validation",
        type=float,
        metavar="SHARE",
        help="keep such a share of the pictures from learning, to tell how good checkpoints are",
    )
    how.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="end behind N checkpoints in a row that are no better on those",
    )
    how.add_argument(
        "--low-ram",
        action="store_true",
        default=None,
        help="read what is learnt from disk each time, rather than keep it in the host's memory",
    )
    how.add_argument(
        "--narrow-captions",
        action="store_true",
        default=None,
        help="keep embeddings of captions in eight bits a number, half the room",
    )
    how.add_argument(
        "-B",
        "--battery",
        type=int,
        metavar="N",
        help="rest behind a checkpoint when the battery of the machine that learns is below N %%",
    )
    how.add_argument("--keep", type=int, metavar="N", help="the last N checkpoints; default: all")


def _batch_size(said: str) -> int | str:
    if said == "auto" or said.isdecimal():
        return said if said == "auto" else int(said)
    raise ArgumentTypeError(f"{said}: a number or auto is wanted")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int | None:
    """Begins, then watches."""
    if args.detach and args.samples:
        raise wrong("--samples", "who watches saves them: jobs watch JOB --samples DIR")
    async with jobs.trainer(settings) as trainer:
        job = await begin(trainer, args, terminal)
        terminal.note(f"job {job.id}: {job.step_count} steps, {job.name}")
        if args.detach:
            terminal.result(json.dumps({"id": job.id}) if args.json else job.id)
            return None
        return await jobs.watch(trainer, job.id, args, terminal)


async def begin(
    trainer: AsyncTrainer, args: Namespace, terminal: Terminal, *, only_caches: bool = False
) -> TrainJob:
    """Looks at everything, sends what the trainer lacks, and begins."""
    if args.checkpoint:
        return await _again(trainer, args, terminal, only_caches=only_caches)
    file = _asked(args)
    data = file.data
    if data is None or not data.sources():
        raise wrong(
            "--images", "there is nothing to learn from; give the folder of pictures, --images DIR"
        )
    terminal.live("looking at pictures")
    dataset = await asyncio.to_thread(gather, data.sources(), _LEAST_SIDE_PX)
    dataset.check(skips_faulty=data.skip_faulty)
    _report(dataset, terminal)
    overriding = {path: getattr(args, flag) for flag, path in _OF_SPEC.items()}
    overriding["name"] = args.name or file.values.get("name") or _usual_name(args, data)
    spec = _job_file.spec(file, overriding, dataset.examples)
    spec.only_caches |= only_caches
    spec.dataset.CopyFrom(await _list_sent(trainer, dataset))
    if beside := args.training_adapter or file.beside:
        terminal.live(f"sending {beside}")
        spec.training.beside.digest.sha256 = await trainer.put_blob(beside)
    await _foretell(trainer, spec, terminal)
    await _send_pictures(trainer, dataset, terminal)
    return await trainer.train(spec)


async def _again(
    trainer: AsyncTrainer, args: Namespace, terminal: Terminal, *, only_caches: bool
) -> TrainJob:
    """Goes on from a file; what else is said goes before what it says."""
    for flag in _OF_DATA:
        if getattr(args, flag):
            said = "--" + _FLAGS.get(flag, flag).replace("_", "-")
            raise wrong("--checkpoint", f"--checkpoint says what is learnt; leave {said} out")
    terminal.live(f"sending {args.checkpoint}")
    values, start, dataset = await archives.send(trainer, args.checkpoint)
    overriding = {path: getattr(args, flag) for flag, path in _OF_SPEC.items()}
    spec = _job_file.spec(JobFile(values), overriding, [])
    spec.only_caches = only_caches
    spec.start.CopyFrom(start)
    spec.dataset.CopyFrom(dataset)
    await _foretell(trainer, spec, terminal)
    return await trainer.train(spec)


def _asked(args: Namespace) -> JobFile:
    """What the file says, and what flags say of data and epochs."""
    if args.epochs is not None and args.steps is not None:
        raise wrong("--epochs", "give --epochs or --steps, not both")
    file = _job_file.read(args.job_file) if args.job_file else JobFile()
    epochs = file.epochs if args.epochs is None else args.epochs
    if args.steps is not None:
        epochs = None
    if args.epochs is not None:
        file = _job_file.without_steps(file)
    if epochs is not None and epochs < 1:
        raise wrong("--epochs", f"{epochs} given, allowed is 1 or more")
    data = file.data or Data()
    if args.images:
        folders = [Folder(path=path, masks=args.masks, flips=args.flip) for path in args.images]
        data = Data(folders=tuple(folders), trigger=data.trigger, skip_faulty=data.skip_faulty)
    elif args.masks or args.flip:
        raise wrong("--images", "--masks and --flip go with --images; a file says it for itself")
    more = {"trigger": args.trigger or data.trigger}
    if args.skip_faulty:
        more["skip_faulty"] = True
    return replace(file, data=data.model_copy(update=more), epochs=epochs)


def _usual_name(args: Namespace, data: Data) -> str:
    if args.job_file:
        return str(args.job_file.stem)
    return data.folders[0].path.resolve().name


def _report(dataset: Dataset, terminal: Terminal) -> None:
    again = dataset.again
    terminal.note(
        f"{len(dataset.examples)} pictures"
        + (f", of which {len(again)} are there under another name: {some(again)}" if again else "")
    )
    if dataset.faults:
        terminal.note(f"left out: {dataset.faults_said}")


async def _foretell(trainer: AsyncTrainer, spec: TrainJobSpec, terminal: Terminal) -> None:
    """What will be learnt, what that takes, and how long, if it is known; raises what speaks
    against it."""
    if spec.only_caches:
        return
    terminal.live("asking what it takes")
    try:
        expected = await trainer.plan(spec)
    except (Unavailable, DeadlineTooShort) as error:  # the job may be begun and wait
        terminal.note(f"not known what it takes: {error.message}")
        return
    needs = expected.needs
    if needs is None:
        terminal.note(f"has to wait: {expected.waits_for}")
        return
    terminal.note(jobs.learns(expected.spec))
    parts = needs.weights_bytes, needs.learnt_bytes, needs.step_bytes
    weights, learnt, step = (f"{part / 2**30:.2f}" for part in parts)
    room = needs.room_bytes
    of_all = "" if room is None else f" of {(needs.weights_bytes + room) / 2**30:.2f}"
    terminal.note(
        f"takes {sum(parts) / 2**30:.2f} GiB{of_all} of the device: the model {weights}, what is "
        f"learnt and the optimiser {learnt}, a step {step}"
    )
    if needs.step_seconds is not None:
        left = (spec.training.step_count - spec.start.step) * needs.step_seconds
        each = (
            f"{needs.step_seconds:.2f}" if needs.step_seconds >= 1 else f"{needs.step_seconds:.2g}"
        )
        terminal.note(
            f"lasts about {jobs.duration(left)}, {each} s a step, where the device does nothing "
            "else"
        )


async def _send_pictures(trainer: AsyncTrainer, dataset: Dataset, terminal: Terminal) -> None:
    there = await trainer.find_blobs(dataset.paths)
    lacking = [path for sha256, path in dataset.paths.items() if sha256 not in there]
    for number, path in enumerate(lacking, 1):
        terminal.live(f"sending pictures, {number} of {len(lacking)}")
        await trainer.put_blob(path)


async def _list_sent(trainer: AsyncTrainer, dataset: Dataset) -> types_pb2.Digest:
    data = dataset_file.dump(dataset.examples)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "dataset.jsonl"
        file.write_bytes(data)
        sha256 = await trainer.put_blob(file)
    return types_pb2.Digest(sha256=sha256, size_bytes=len(data), media_type=dataset_file.MEDIA_TYPE)
