"""`zimage-client jobs`: trainings as they go on."""

import json
import math
from argparse import ArgumentParser, Namespace
from contextlib import aclosing
from pathlib import Path

from zimage_client import (
    AsyncTrainer,
    TrainCaching,
    TrainCheckpoint,
    TrainJob,
    TrainSamples,
    TrainStep,
)
from zimage_client import _archives as archives
from zimage_client._plot import smoother, svg
from zimage_client.cli import output
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.errors import NotFound
from zimage_core.files import write_whole
from zimage_core.settings import ClientSettings
from zimage_core.wire.names import RECOMPUTES, name_of
from zimage_rpc.trainer.v1.trainer_pb2 import TrainJobSpec

_FAILED = 1
_MUCH_LOST_DETAIL = 0.3
"""From here on blur is seen."""


def add_flags(parser: ArgumentParser) -> list[ArgumentParser]:
    """What can be done, each with its arguments; the settings go with these."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in (
        ("list", "list all, the latest first"),
        ("show", "show what is known of one"),
        ("watch", "tell what happens until it ends"),
        ("logs", "tell what has happened, and draw its losses with --plot"),
        ("pause", "let one rest behind its next checkpoint"),
        ("resume", "let one go on from its last checkpoint"),
        ("cancel", "end one for good; its checkpoints stay"),
        ("delete", "take away one that has ended, with its checkpoints"),
        ("export", "write what was learnt to a file"),
    ):
        of_action = actions.add_parser(
            action, help=purpose, description=purpose, allow_abbrev=False
        )
        if action != "list":
            of_action.add_argument("job", metavar="JOB")
        of_action.add_argument(
            "--json", action="store_true", help="one JSON object a line on stdout"
        )
        if action == "watch":
            add_samples_flag(of_action)
        if action == "logs":
            of_action.add_argument(
                "--plot", type=Path, metavar="FILE", help="draw the losses as an SVG"
            )
            of_action.add_argument("--overwrite", action="store_true", help="replace a file")
        if action == "export":
            of_action.add_argument("-o", "--output", type=Path, metavar="FILE", help="required")
            of_action.add_argument(
                "--step", type=int, metavar="N", help="default: the best, or the last"
            )
            of_action.add_argument("--overwrite", action="store_true", help="replace a file")
            of_action.add_argument(
                "--zip",
                action="store_true",
                help="write all that training goes on from, for train --checkpoint",
            )
    return list(actions.choices.values())


def add_samples_flag(parser: ArgumentParser) -> None:
    """Where the pictures go that are drawn with checkpoints."""
    parser.add_argument(
        "--samples", type=Path, metavar="DIR", help="save the pictures drawn with checkpoints there"
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int | None:
    """Does the one thing."""
    async with trainer(settings) as client:
        if args.action == "watch":
            return await watch(client, args.job, args, terminal)
        if args.action in _ACTIONS:
            await _ACTIONS[args.action](client, args, terminal)
        else:  # pause, resume, cancel
            _show(await getattr(client, args.action)(args.job), args, terminal)
    return None


async def _list(client: AsyncTrainer, args: Namespace, terminal: Terminal) -> None:
    for job in await client.jobs():
        _show(job, args, terminal)


async def _show_one(client: AsyncTrainer, args: Namespace, terminal: Terminal) -> None:
    job = await client.get(args.job)
    _show(job, args, terminal)
    if not args.json:
        if job.step:  # it has begun: everything is decided
            terminal.result(f"  {learns(job.spec)}")
        for kept in job.checkpoints:
            is_best = kept == job.best and kept.validation_loss is not None
            terminal.result(f"  {_kept(kept)}: {kept.weights.sha256}{'  the best' * is_best}")


async def _delete(client: AsyncTrainer, args: Namespace, terminal: Terminal) -> None:
    await client.delete(args.job)


def trainer(settings: ClientSettings) -> AsyncTrainer:
    """The client of the trainer service that is configured."""
    if not settings.trainer:
        raise wrong("--trainer", "training needs a trainer service; give --trainer ADDR")
    return AsyncTrainer(settings.trainer, **settings.credentials)


async def watch(client: AsyncTrainer, job_id: str, args: Namespace, terminal: Terminal) -> int:
    """What happens until it ends; Ctrl-C leaves it to go on."""
    progress = _Progress()
    last = await client.get(job_id)
    async with aclosing(client.watch(job_id)) as events:
        async for event in events:
            match event:
                case TrainJob():
                    if (event.state, event.waits_for) != (last.state, last.waits_for):
                        _tell_state(event, terminal)
                    last = event
                case TrainStep():
                    progress.enter(event)
                    if args.json:
                        terminal.result(json.dumps(_step(event)))
                    terminal.live(progress.line(last.step_count))
                case TrainCaching():
                    if args.json:
                        terminal.result(json.dumps({"encoded": event.done, "of": event.total}))
                    terminal.live(f"encoded {event.done} of {event.total} samples")
                case TrainSamples():
                    await _save(client, job_id, event, args, terminal)
                case TrainCheckpoint():
                    _tell_kept(event, args, terminal)
    last = await client.get(job_id)
    _show(last, args, terminal)
    return 0 if last.state == "completed" else _FAILED


async def _save(
    client: AsyncTrainer, job: str, drawn: TrainSamples, args: Namespace, terminal: Terminal
) -> None:
    """Pictures by their steps and prompts, where somebody wants them."""
    if args.json:
        files = [
            {
                "prompt": one.prompt,
                "sha256": one.picture.sha256,
                "lost_detail": one.lost_detail,
            }
            for one in drawn.pictures
        ]
        terminal.result(json.dumps({"step": drawn.step, "samples": files}))
    lost = max((one.lost_detail or 0 for one in drawn.pictures), default=0)
    if lost > _MUCH_LOST_DETAIL:
        terminal.note(
            f"behind step {drawn.step} pictures of few steps have lost {lost:.0%} of their detail "
            "against those of many: the model is forgetting its distillation; stop sooner, learn "
            "slower, or train beside a LoRA that undoes it, --training-adapter FILE"
        )
    if args.samples is None:
        return
    args.samples.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(drawn.pictures):
        file = args.samples / f"{job}-{drawn.step:06}-{number}.png"
        await client.get_blob(one.picture.sha256, file)
        terminal.note(f"{file}  {one.prompt}")


class _Progress:
    """How a training goes, in a line."""

    def __init__(self) -> None:
        self._smoothed = math.nan
        self._waited = self._worked = 0.0
        self._last: TrainStep | None = None

    def enter(self, step: TrainStep) -> None:
        """One more is done."""
        self._last = step
        self._smoothed = smoother(self._smoothed, step.loss)
        self._waited += step.waited_seconds
        self._worked += step.seconds

    def line(self, step_count: int) -> str:
        """For people who watch."""
        step = self._last
        assert step is not None
        done = step.step + 1
        each = step.seconds + step.waited_seconds
        share = self._waited / max(self._waited + self._worked, 1e-9)
        left = each * (step_count - done)
        memory = f"{step.device_bytes / 2**30:.1f} GiB  " if step.device_bytes else ""
        return (
            f"step {done} of {step_count}  loss {step.loss:.4f} ({self._smoothed:.4f})  "
            f"gradient {step.gradient_norm:.3g}  rate {step.learning_rate:.2e}  "
            f"{each:.2f} s  waited {share:.0%}  {memory}{duration(left)} left"
        )


async def _logs(client: AsyncTrainer, args: Namespace, terminal: Terminal) -> None:
    if args.plot:
        output.check(args.plot, overwrite=args.overwrite)
    job = await client.get(args.job)
    losses: list[tuple[int, float]] = []
    async with aclosing(client.watch(job.id, only_past=True)) as events:
        async for event in events:
            match event:
                case TrainStep():
                    losses.append((event.step, event.loss))
                    terminal.result(json.dumps(_step(event)) if args.json else _told(event))
                case TrainCheckpoint() if not args.json:
                    terminal.result(_kept(event))
    if args.plot:
        write_whole(args.plot, svg(f"{job.name}: loss", losses).encode())
        terminal.note(f"{args.plot}: the losses, and their running mean")


def _tell_state(job: TrainJob, terminal: Terminal) -> None:
    if not job.has_ended:
        terminal.note(job.state + (f": {job.waits_for}" if job.waits_for else ""))
    if job.state == "running" and not job.spec.only_caches:  # everything is decided now
        terminal.note(learns(job.spec))


def learns(spec: TrainJobSpec) -> str:
    """What is really learnt, and how, once that is decided."""
    plan = spec.training
    groups = [
        f"rank {one.rank} in {one.stack} {one.first_block} to {one.end_block - 1}, "
        f"{len(one.linears)} linears each"
        for one in plan.lora.groups
    ]
    what = "the transformer itself" if plan.full else "a LoRA, " + "; ".join(groups)
    at_once = min(plan.samples_at_once, spec.batch_size)
    recompute = name_of(plan.recompute, RECOMPUTES) or "as there is room"
    return (
        f"learns {what}; samples a step: {spec.batch_size}, at once: {at_once}; "
        f"recompute {recompute}"
    )


def _tell_kept(checkpoint: TrainCheckpoint, args: Namespace, terminal: Terminal) -> None:
    if args.json and checkpoint.validation_loss is not None:
        loss = checkpoint.validation_loss
        told = {"step": checkpoint.step, "validation_loss": loss if math.isfinite(loss) else None}
        terminal.result(json.dumps(told))
    terminal.note(_kept(checkpoint))


def _kept(checkpoint: TrainCheckpoint) -> str:
    loss = checkpoint.validation_loss
    more = "" if loss is None else f", loss {loss:.4f} on what is not learnt"
    return f"checkpoint behind step {checkpoint.step}{more}"


def _told(step: TrainStep) -> str:
    more = "  skipped: no finite gradient" if step.skipped else ""
    return (
        f"step {step.step + 1}  loss {step.loss:.4f}  gradient {step.gradient_norm:.3g}  "
        f"rate {step.learning_rate:.2e}  {step.seconds:.2f} s{more}"
    )


async def _export(client: AsyncTrainer, args: Namespace, terminal: Terminal) -> None:
    if args.output is None:
        raise wrong("--output", "give the file to write, -o FILE")
    output.check(args.output, overwrite=args.overwrite)
    job = await client.get(args.job)
    found = job.checkpoints[-1] if args.zip and job.checkpoints else job.best
    if args.step is not None:
        found = next((kept for kept in job.checkpoints if kept.step == args.step), None)
    if found is None:
        there = ", ".join(str(kept.step) for kept in job.checkpoints) or "none yet"
        raise NotFound(f"job {job.id} has no such checkpoint; there is {there}")
    if args.zip:
        await archives.save(client, job, found, args.output)
    else:
        await client.get_blob(found.weights.sha256, args.output)
    terminal.result(f"{args.output}  behind step {found.step}")


_ACTIONS = {
    "list": _list,
    "show": _show_one,
    "logs": _logs,
    "delete": _delete,
    "export": _export,
}


def _show(job: TrainJob, args: Namespace, terminal: Terminal) -> None:
    failure = job.failure.message if job.failure else ""
    if args.json:
        told = {
            "id": job.id, "name": job.name, "state": job.state, "waits_for": job.waits_for,
            "failure": failure, "step": job.step, "step_count": job.step_count,
            "checkpoints": [kept.step for kept in job.checkpoints],
            "best": job.best.step if job.best else None,
        }  # fmt: skip
        terminal.result(json.dumps(told))
        return
    more = job.waits_for or failure
    terminal.result(
        f"{job.id}  {job.name}  {job.state}  step {job.step} of {job.step_count}"
        + (f"  {more}" if more else "")
    )


def _step(step: TrainStep) -> dict[str, object]:
    return {
        "step": step.step,
        "loss": step.loss if math.isfinite(step.loss) else None,
        "gradient_norm": step.gradient_norm if math.isfinite(step.gradient_norm) else None,
        "learning_rate": step.learning_rate,
        "skipped": step.skipped,
        "seconds": round(step.seconds, 4),
        "waited_seconds": round(step.waited_seconds, 4),
        "device_bytes": step.device_bytes,
    }


def duration(seconds: float) -> str:
    """As people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
