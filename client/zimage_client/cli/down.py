"""`zimage-client down`: the end of every embedded stack of this user."""

import json
from argparse import ArgumentParser, Namespace

from zimage_client._embedded import warm
from zimage_client.cli.terminal import Terminal
from zimage_core.settings import ClientSettings


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--json", action="store_true", help="one JSON object a stack on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Returns when the processes have ended."""
    stacks = await warm.down_all(terminal.live)
    for stack in stacks:
        shown = {"model": str(stack.model), "logs": str(stack.folder)}
        terminal.result(json.dumps(shown) if args.json else f"{stack.model}  down")
    if not stacks:
        terminal.note("no embedded stack runs")
