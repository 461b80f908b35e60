"""`zimage-client verify`: makes a picture again and says whether it is the same."""

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from zimage_client import Completed, Options, Receipt
from zimage_client._receipt import read_picture
from zimage_client.cli import conditioning, stack
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import seconds, wrong
from zimage_core.pictures import files
from zimage_core.settings import ClientSettings

_EQUAL, _OTHER = 0, 1


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("picture", nargs="?", type=Path, metavar="PICTURE")
    parser.add_argument(
        "--embedding", type=Path, metavar="FILE", help="what it was made of, if not of a prompt"
    )
    parser.add_argument(
        "--negative-embedding", type=Path, metavar="FILE", help="the same for what it led away from"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help="default: never")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """0 when the picture came out the same and the file was not edited, else 1."""
    if args.picture is None:
        raise wrong("PICTURE", "give a PICTURE")
    receipt, picture = read_picture(args.picture)
    positive = conditioning.repeated(receipt.positive, args.embedding, "--embedding")
    negative = receipt.negative and conditioning.repeated(
        receipt.negative, args.negative_embedding, "--negative-embedding"
    )
    options = Options(**receipt.options, negative=negative, timeout=args.timeout)
    size = receipt.options["width"], receipt.options["height"]
    is_edited = picture.image.size != size or (
        picture.is_lossless and picture.pixels_sha256 != receipt.pixels_sha256
    )
    async with stack.for_pictures(settings, terminal) as client:
        terminal.live("making it again")
        again = await client.generate(positive, **options)
    [made] = again.pictures
    is_equal = made.pixels_sha256 == receipt.pixels_sha256
    psnr = None if picture.image.size != size else picture.psnr(files.decode(made.data, "again"))
    differences = dict(_differences(receipt, again.completed))
    if args.json:
        line = {
            "path": str(args.picture),
            "equal": is_equal,
            "edited": is_edited,
            "psnr_db": None if is_equal or psnr in (None, math.inf) else round(psnr, 2),
            "differences": differences,
        }
        terminal.result(json.dumps(line))
    else:
        compared = "equal" if is_equal else "not equal"
        distance = "" if is_equal or psnr is None else f", {psnr:.1f} dB from this file"
        edited = ", but the file was edited since it was made" if is_edited else ""
        terminal.result(f"{args.picture}  {compared}{distance}{edited}")
        for name, (then, now) in differences.items():
            terminal.result(f"  {name}: {then} then, {now} now")
    return _EQUAL if is_equal and not is_edited else _OTHER


def _differences(receipt: Receipt, now: Completed) -> Iterator[tuple[str, tuple[object, object]]]:
    """What is not as it was when the picture was made."""
    sides = {
        "positive": (receipt.positive_provenance, now.positive),
        "negative": (receipt.negative_provenance, now.negative),
    }
    for name, (then, here) in sides.items():
        if then is not None and here is not None:
            yield from _unequal(name, asdict(then), asdict(here))
    yield from _unequal("plan", asdict(receipt.numeric_plan), asdict(now.numeric_plan))


def _unequal(
    whole: str, then: dict[str, object], now: dict[str, object]
) -> Iterator[tuple[str, tuple[object, object]]]:
    for name, value in then.items():
        if value != now[name] and name != "packing":
            yield f"{whole} {name}", (value, now[name])
