"""`zimage-client generate`: a prompt in, picture files out."""

import argparse
import json
import secrets
import time
from argparse import ArgumentParser, Namespace
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from zimage_client import (
    Accepted,
    Completed,
    Options,
    Picture,
    Preview,
    Receipt,
    read_receipt,
)
from zimage_client._options import SEED_LIMIT, spec
from zimage_client.cli import adapters, conditioning, output, previews, prompt, stack
from zimage_client.cli.progress import ProgressText
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import seconds
from zimage_core.files import write_whole
from zimage_core.planning import sizes
from zimage_core.settings import ClientSettings
from zimage_core.wire import names

_SIDE_MULTIPLE_PX = 16
_REPLACED_BY_SIGMAS = ("steps", "schedule")
_OF_GUIDANCE = ("negative_prompt", "negative_embedding", "cfg_normalization", "cfg_truncation")


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the picture shall show")
    parser.add_argument(
        "--embedding", type=Path, metavar="FILE", help="an encoded prompt, in place of PROMPT"
    )
    prompt.add_flags(parser)

    parser.add_argument(
        "--from",
        dest="receipt",
        type=Path,
        metavar="PICTURE",
        help="repeat a picture by the receipt in its file; other flags change it",
    )
    picture = parser.add_argument_group("picture")
    picture.add_argument("--width", type=int, metavar="PX", help="in pixels, a multiple of 16")
    picture.add_argument("--height", type=int, metavar="PX", help="in pixels, a multiple of 16")
    picture.add_argument("--seed", type=int, help="of the first picture; picture i has SEED + i")
    picture.add_argument("--count", type=int, help="how many pictures (default 1)")
    picture.add_argument("--steps", type=int, help="denoising steps")
    picture.add_argument(
        "--solo",
        action="store_true",
        help="share no step with other requests: the same picture to the last bit, and slower",
    )

    adapters.add_use_flag(picture)

    guidance = parser.add_argument_group("guidance")
    guidance.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="g in v = v+ + g (v+ - v-), 0 is off; the usual scale is w = 1 + g",
    )
    guidance.add_argument(
        "--force-guidance",
        action="store_true",
        default=None,
        help="allow guidance on a Turbo model, which was made to run without",
    )
    negative = guidance.add_mutually_exclusive_group()
    negative.add_argument("--negative-prompt", metavar="TEXT", help="what to lead away from")
    negative.add_argument(
        "--negative-embedding", type=Path, metavar="FILE", help="the same, encoded"
    )
    guidance.add_argument(
        "--cfg-normalization",
        type=float,
        metavar="C",
        help="bound the guided prediction's norm to C times the positive one's; 0 is off",
    )
    guidance.add_argument(
        "--cfg-truncation",
        type=float,
        metavar="T",
        help="no guidance in steps whose 1 - sigma is above T; 1 is never",
    )

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--shift", type=float, help="static shift (default: the model's)")
    schedule.add_argument(
        "--schedule",
        choices=tuple(names.RULES),
        help="legacy: the older spelling in which N steps are N - 1 forwards",
    )
    schedule.add_argument(
        "--sigmas", type=_numbers, metavar="S,S,...", help="the noise levels, before the shift"
    )

    files = parser.add_argument_group("output")
    files.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: zimage-SEED.png")
    files.add_argument("--format", choices=tuple(names.FORMATS), help="default: by FILE's name")
    files.add_argument("--quality", type=int, help="1 to 100, for JPEG and WebP")
    files.add_argument(
        "--metadata",
        choices=tuple(names.METADATA),
        help="what the file says of how it was made; none leaves the prompts out",
    )
    files.add_argument("--overwrite", action="store_true", help="replace files that exist")
    files.add_argument("--json", action="store_true", help="one JSON object a line on stdout")

    previews.add_flags(parser)

    parser.add_argument(
        "--priority",
        choices=tuple(names.PRIORITIES),
        help="how urgent it is, next to the requests of others (default: normal)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="give up after this long (default: never)",
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Checks everything that can be checked here, then makes the pictures."""
    receipt = read_receipt(args.receipt) if args.receipt else None
    sides = conditioning.given(args, receipt)
    options = _options(args, terminal, receipt)
    options["negative"] = sides.negative
    options |= previews.options(args)
    outputs = output.for_pictures(
        args.output, args.format, options["seed"] or 0, args.count or 1, overwrite=args.overwrite
    )
    if args.format or outputs.format != "png":
        options["format"] = outputs.format  # type: ignore[typeddict-item]
    spec(options)  # refuses what cannot be said before any service is started
    show = previews.shown(args, outputs, terminal)
    accepted: Accepted | None = None
    text = ProgressText()
    async with (
        stack.for_pictures(settings, terminal) as client,
        aclosing(client.stream(sides.positive, **options)) as events,
    ):
        began = time.monotonic()
        async for event in events:
            if line := text.of(event):
                terminal.live(line)
            if isinstance(event, Accepted):
                if accepted is None:
                    _tell_what_has_no_effect(args, event, terminal)
                accepted = event
            if isinstance(event, Preview):
                show(event)
            if isinstance(event, Picture):
                path = outputs.paths[event.index]
                write_whole(path, event.data)
                now = time.monotonic()
                terminal.result(_result(args, path, event, accepted, now - began))
                began = now
            if isinstance(event, Completed):
                _tell_what_was_compressed(event, terminal)
    terminal.clear()


def _options(args: Namespace, terminal: Terminal, receipt: Receipt | None) -> Options:
    """What the flags say; what they leave open is as in the receipt, if there is one."""
    given = {
        "width": _snapped("--width", args.width, terminal),
        "height": _snapped("--height", args.height, terminal),
        "seed": args.seed,
        "count": args.count,
        "steps": args.steps,
        "guidance": args.guidance,
        "schedule": args.schedule,
        "sigmas": args.sigmas,
        "shift": args.shift,
        "force_guidance": args.force_guidance,
        "cfg_normalization": args.cfg_normalization,
        "cfg_truncation": args.cfg_truncation,
        "quality": args.quality,
        "metadata": args.metadata,
        "packing": "solo" if args.solo else None,
        "priority": args.priority,
        "adapters": adapters.uses(args),
        "timeout": args.timeout,
    }
    options: dict[str, Any] = {"seed": secrets.randbelow(SEED_LIMIT)}
    options |= receipt.options if receipt else {}
    replaced: tuple[str, ...] = _REPLACED_BY_SIGMAS if given["sigmas"] is not None else ()
    if any(given[name] is not None for name in _REPLACED_BY_SIGMAS):
        replaced = ("sigmas",)
    options = {name: value for name, value in options.items() if name not in replaced}
    options |= {name: value for name, value in given.items() if value is not None}
    return cast("Options", options)


def _tell_what_was_compressed(completed: Completed, terminal: Terminal) -> None:
    for name, side in (("prompt", completed.positive), ("negative prompt", completed.negative)):
        if side is None:
            continue
        count, rows = side.token_count, side.recipe.row_count(side.token_count)
        if rows < count:
            mode = side.recipe.long_prompt_mode
            terminal.note(f"the {name} has {count} tokens; {mode} left {rows} rows of them")


def _tell_what_has_no_effect(args: Namespace, accepted: Accepted, terminal: Terminal) -> None:
    given = [name for name in _OF_GUIDANCE if getattr(args, name) is not None]
    if accepted.guidance == 0:
        why = "guidance is off" + (
            "" if args.guidance == 0 else ", as this model has it by default"
        )
        for name in given:
            terminal.note(f"--{name.replace('_', '-')} has no effect: {why}")
    if args.preview_every is not None and args.preview_every >= accepted.steps:
        terminal.note(
            f"--preview-every {args.preview_every} shows nothing in {accepted.steps} steps: the "
            "last one makes the picture itself"
        )


def _snapped(flag: str, side: int | None, terminal: Terminal) -> int | None:
    """The nearest side that a model can make; what is no size at all is left to the server."""
    if side is None or side <= 0 or side % _SIDE_MULTIPLE_PX == 0:
        return side
    nearest = sizes.snapped(side, _SIDE_MULTIPLE_PX)
    terminal.note(f"{flag} {side} is no multiple of {_SIDE_MULTIPLE_PX}: {nearest} is used")
    return nearest


def _result(
    args: Namespace, path: Path, picture: Picture, accepted: Accepted | None, took: float
) -> str:
    if not args.json:
        return f"{path}  seed {picture.seed}  {took:.1f} s"
    line: dict[str, Any] = {
        "path": str(path),
        "index": picture.index,
        "seed": picture.seed,
        "seconds": round(took, 3),
        "sha256": picture.sha256,
        "media_type": picture.media_type,
    }
    if accepted is not None:
        line |= {
            "width": accepted.width,
            "height": accepted.height,
            "steps": accepted.steps,
            "guidance": accepted.guidance,
        }
    return json.dumps(line)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,0.5") from None
