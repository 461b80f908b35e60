"""`zimage-client inspect`: what a picture's file says of how it was made."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from zimage_client import Prompt, Receipt
from zimage_client._receipt import read_picture
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("picture", nargs="?", type=Path, metavar="PICTURE")
    parser.add_argument("--json", action="store_true", help="the receipt as it stands in the file")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Reads the file; needs no service."""
    if args.picture is None:
        raise wrong("PICTURE", "give a PICTURE")
    receipt, picture = read_picture(args.picture)
    if args.json:
        terminal.result(receipt.text)
        return
    for name, value in _lines(receipt):
        terminal.result(f"{name:<12}{value}")
    if picture.is_lossless:
        is_whole = picture.pixels_sha256 == receipt.pixels_sha256
        terminal.result(f"{'pixels':<12}{'as they were made' if is_whole else 'edited since'}")


def _lines(receipt: Receipt) -> Iterator[tuple[str, object]]:
    options, plan = receipt.options, receipt.numeric_plan
    yield "prompt", _said(receipt.positive)
    if receipt.negative is not None:
        yield "negative", _said(receipt.negative)
    yield "size", f"{options['width']} x {options['height']}"
    yield "seed", options["seed"]
    if "sigmas" in options:
        yield "sigmas", ", ".join(f"{sigma:g}" for sigma in options["sigmas"] or ())
    else:
        yield "steps", f"{options['steps']}, {options['schedule']}"
    yield "shift", f"{options['shift']:g}"
    yield "guidance", f"{options['guidance']:g}"
    for sha256, scale in (options.get("adapters") or {}).items():
        yield "adapter", f"{sha256}, {scale:g}"
    if plan.fused_adapter:
        yield "fused", f"{plan.fused_adapter}, {plan.fused_adapter_scale:g}"
    yield "model", f"{receipt.model_name}, encoder {receipt.positive_provenance.identity[:12]}"
    weights = f" with weights in {plan.weights}" if plan.weights not in ("", "full") else ""
    weights += " as they were learnt by then" if plan.learning else ""
    how = f"{plan.attention_backend}, {plan.packing}"
    yield "computed", f"{plan.compute_type}{weights} on {plan.device}, {how}"
    versions = {"zimage-grpc": receipt.version, **plan.library_versions}
    yield "versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _said(side: Prompt | str) -> str:
    return side.text if isinstance(side, Prompt) else f"embedding {side}"
