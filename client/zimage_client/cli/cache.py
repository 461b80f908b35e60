"""`zimage-client cache`: what a trainer keeps of captions and pictures that were encoded."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from contextlib import aclosing

from zimage_client import CacheKind
from zimage_client.cli import jobs, train
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings

_DAY_SECONDS = 86_400.0
_TORN = 1
_MOST_GB = 1e9


def add_flags(parser: ArgumentParser) -> list[ArgumentParser]:
    """What can be done, each with its arguments; the settings go with these."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in (
        ("build", "encode all that a job needs, and learn nothing"),
        ("stats", "show how much there is"),
        ("verify", "read all of it; what is not what it should be goes, and is made again"),
        ("prune", "take away what was not used for long, and pictures of no job"),
    ):
        of_action = actions.add_parser(
            action, help=purpose, description=purpose, allow_abbrev=False
        )
        of_action.add_argument(
            "--json", action="store_true", help="one JSON object a line on stdout"
        )
        if action == "build":
            train.add_job_flags(of_action)
            of_action.set_defaults(samples=None)
        if action == "prune":
            of_action.add_argument(
                "--unused-days",
                type=float,
                metavar="N",
                help="what was not used for so long; default: 30, with --most-gb any time",
            )
            of_action.add_argument(
                "--most-gb",
                type=float,
                metavar="N",
                help="what was encoded and is unused the longest, until the rest takes so much",
            )
    return list(actions.choices.values())


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int | None:
    """Does the one thing."""
    async with jobs.trainer(settings) as client:
        match args.action:
            case "build":
                job = await train.begin(client, args, terminal, only_caches=True)
                return await jobs.watch(client, job.id, args, terminal)
            case "stats":
                _show(await client.cache(), args, terminal)
            case "prune":
                seconds = None if args.unused_days is None else args.unused_days * _DAY_SECONDS
                if args.most_gb is not None and not 0 <= args.most_gb < _MOST_GB:
                    raise wrong("--most-gb", f"{args.most_gb} given, allowed is 0 or more")
                most = None if args.most_gb is None else round(args.most_gb * 1e9)
                _show(await client.prune_cache(seconds, most), args, terminal)
            case "verify":
                torn: list[str] = []
                async with aclosing(client.verify_cache()) as pages:
                    async for count, found in pages:
                        torn += found
                        terminal.live(f"{count} read, {len(torn)} torn")
                if args.json:
                    terminal.result(json.dumps({"read": count, "torn": torn}))
                else:
                    terminal.result("\n".join([f"{count} read, {len(torn)} torn", *torn]))
                return _TORN if torn else None
    return None


def _show(kinds: Iterable[CacheKind], args: Namespace, terminal: Terminal) -> None:
    for one in kinds:
        if args.json:
            told = {"kind": one.kind, "count": one.count, "bytes": one.size_bytes}
            terminal.result(json.dumps(told))
        else:
            terminal.result(f"{one.kind:12} {one.count:8}  {one.size_bytes / 1e6:10.1f} MB")
