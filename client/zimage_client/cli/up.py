"""`zimage-client up`: an embedded stack that stays."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from zimage_client._embedded import warm
from zimage_client._embedded.stack import demo_model, refuse_what_cannot_work
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="model folder (default: the demo model)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Returns when the services serve; commands without --server use them from then on."""
    refuse_what_cannot_work()
    if args.model is not None and not args.model.is_dir():
        raise wrong("--model", f"{args.model} is no model folder")
    stack = await warm.up(args.model or demo_model(), terminal.live)
    at = stack.addresses
    if args.json:
        shown = {"model": str(stack.model), "server": at.server, "encoder": at.encoder}
        terminal.result(json.dumps(shown | {"logs": str(stack.folder)}))
    else:
        terminal.result(f"{stack.model}  up until `zimage-client down`")
        terminal.result(f"  DiT      {at.server}")
        terminal.result(f"  encoder  {at.encoder}")
        terminal.result(f"  logs     {stack.folder}")
