"""`zimage-client trace`: what the device of a running service did of late, and for whom."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from zimage_client import AsyncClient, Unavailable
from zimage_client._embedded import warm
from zimage_client.cli import timeline
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import seconds
from zimage_core.settings import ClientSettings

_DONE = 0


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--last", type=seconds, default=60.0, metavar="SECONDS", help="how far back (default: 60)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write it in Chrome's trace format, for chrome://tracing or ui.perfetto.dev",
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """A lane for each request, as text, and as a file where one is asked for."""
    server, credentials = settings.server, settings.credentials
    if not server:
        if not (stacks := warm.running_stacks()):
            raise Unavailable(
                "no service is configured and no embedded stack runs; give --server ADDR",
                reason="NO_SERVICE",
            )
        server, credentials = stacks[0].addresses.server, {}
    async with AsyncClient(server, **credentials) as client:
        spans = (await client.trace(args.last)).spans
    for line in timeline.text(spans, terminal.width):
        terminal.result(line)
    if args.output:
        args.output.write_text(json.dumps(timeline.chrome(spans)))
    return _DONE
