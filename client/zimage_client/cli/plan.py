"""`zimage-client plan`: what a training takes of a card's memory, by arithmetic; or where what best
goes."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from zimage_client.cli import here
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.errors import InvalidRequest
from zimage_core.formats.published import DIT_PATCH_SIZE, DIT_SHAPE
from zimage_core.planning.limits import padded
from zimage_core.planning.training import TrainingPlan
from zimage_core.planning.training_memory import (
    BLOCKS,
    LEAST_FORWARDS,
    WAYS,
    Base,
    Rows,
    TrainingBytes,
    best_batch,
    fitting,
    forwards,
    largest,
)
from zimage_core.settings import ClientSettings
from zimage_core.wire import training as plans
from zimage_core.wire.names import OPTIMIZERS
from zimage_rpc.dit.v1 import training_pb2

_BATCHES = (1, 2, 4, 8)
_ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
_LATENT_PX = 8
_RESERVED_BYTES = 1 << 30
"""CUDA itself, a screen, and what is lost between pieces."""
_MOST_GIB = 10_000
_NOT_FITTING = 1


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--vram", type=float, metavar="GIB", help="memory of the card, as it is sold"
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="instead: measure the services and the links to them, and say what best goes where",
    )
    parser.add_argument("--side", type=int, default=1024, metavar="PX", help="default: 1024")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--full", action="store_true", help="of learning the transformer itself")
    parser.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="default: adamw"
    )
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="of a caption; default: 128"
    )
    parser.add_argument(
        "--dtype", choices=tuple(_ELEMENT_BYTES), default="bfloat16", help="default: bfloat16"
    )
    parser.add_argument(
        "--weights", choices=("full", "int8", "fp8", "nf4"), default="full", help="default: full"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int | None:
    """Arithmetic alone, which needs no service and no card; or a look at the services."""
    if args.here:
        await here.run(args, settings, terminal)
        return None
    if args.vram is None or not 0 < args.vram < _MOST_GIB:
        raise wrong("--vram", "give the card's memory in GiB, such as --vram 24")
    plan, sample = _plan(args), _sample(args.side, args.tokens)
    learnt = "all of the transformer" if args.full else f"a LoRA of rank {args.rank}"
    room = args.vram * 2**30 - _RESERVED_BYTES
    if not args.json:
        terminal.result(
            f"{learnt} at {args.side}x{args.side}, {args.optimizer}, {args.dtype}, weights "
            f"{args.weights}, {args.vram:g} GiB of which {_told(_RESERVED_BYTES)} are for CUDA and "
            "a screen\n"
            f"{'batch':>5} {'recompute':>12} {'at once':>8} {'weights':>9} {'learnt':>9} "
            f"{'step':>9} {'all':>9}   fits"
        )
    is_any = False
    for count in _BATCHES:
        batch = [sample] * count
        best = fitting(DIT_SHAPE, plan, batch, _base(args), room)
        is_any |= best is not None
        ways = [*((way, count) for way in WAYS), *([(BLOCKS, 1)] if count > 1 else [])]
        if best and (best.recompute, best.samples_at_once) not in ways:
            ways.append((best.recompute, best.samples_at_once))
        for recompute, at_once in ways:
            tried = replace(plan, recompute=recompute, samples_at_once=at_once)
            taken = largest(DIT_SHAPE, tried, batch, _base(args))
            _tell(count, tried, taken, room, args, terminal, is_best=tried == best)
    largest_one = best_batch(DIT_SHAPE, plan, sample, _base(args), room)
    if largest_one and args.json:
        told = {"batch_auto": largest_one.samples_at_once, "recompute": largest_one.recompute}
        terminal.result(json.dumps(told))
    elif largest_one:
        way = f"recompute {largest_one.recompute}"
        terminal.result(f"batch auto: {largest_one.samples_at_once}, {way}")
    return None if is_any else _NOT_FITTING


def _tell(  # noqa: PLR0913 - a row has these columns
    count: int,
    plan: TrainingPlan,
    taken: TrainingBytes,
    room: float,
    args: Namespace,
    terminal: Terminal,
    *,
    is_best: bool,
) -> None:
    if args.json:
        told = {
            "batch_size": count, "recompute": plan.recompute,
            "samples_at_once": plan.samples_at_once, "weights_bytes": round(taken.weights),
            "learnt_bytes": round(taken.learnt), "step_bytes": round(taken.step),
            "fits": taken.all <= room, "best": is_best,
        }  # fmt: skip
        terminal.result(json.dumps(told))
        return
    said = "best" if is_best else "yes" if taken.all <= room else "no"
    more = forwards(plan) / LEAST_FORWARDS - 1
    if is_best and more:
        said += f", {more:.0%} more arithmetic than with nothing computed again"
    terminal.result(
        f"{count:>5} {plan.recompute:>12} {plan.samples_at_once:>8} {_told(taken.weights):>9} "
        f"{_told(taken.learnt):>9} {_told(taken.step):>9} {_told(taken.all):>9}   {said}"
    )


def _plan(args: Namespace) -> TrainingPlan:
    lora = training_pb2.LoraPlan(groups=[training_pb2.LoraGroup(rank=args.rank)])
    message = training_pb2.TrainingPlan(
        step_count=1,
        lora=None if args.full else lora,
        full=args.full,
        optimizer=training_pb2.OptimizerPlan(name=OPTIMIZERS[args.optimizer]),
    )
    try:
        return plans.plan(message, DIT_SHAPE, "plan")
    except InvalidRequest as error:
        raise wrong("--rank", error.message) from None


def _base(args: Namespace) -> Base:
    if args.full and args.weights != "full":
        raise wrong("--weights", "full training learns full weights")
    return Base(_ELEMENT_BYTES[args.dtype], args.weights)


def _sample(side_px: int, tokens: int) -> Rows:
    multiple = _LATENT_PX * DIT_PATCH_SIZE
    if side_px < multiple or side_px % multiple:
        raise wrong("--side", f"--side {side_px}: a multiple of {multiple} is wanted")
    if tokens < 1:
        raise wrong("--tokens", f"--tokens {tokens}: 1 or more is wanted")
    return Rows(padded((side_px // multiple) ** 2), padded(tokens))


def _told(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
