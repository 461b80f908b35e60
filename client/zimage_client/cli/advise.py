"""`zimage-client advise`: the settings that suit a card, as a settings file."""

from argparse import ArgumentParser, Namespace

from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.planning.advice import CARDS, advise, as_toml
from zimage_core.settings import ClientSettings

_SIDE_MULTIPLE_PX = 16
_LONGEST_SIDE_PX = 4096
_MOST_GIB = 10_000


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--vram", type=float, metavar="GIB", help="memory of the card, as it is sold"
    )
    parser.add_argument(
        "--cards", action="store_true", help="profiles for common cards instead: deploy/cards.toml"
    )
    parser.add_argument(
        "--side", type=int, default=1024, metavar="PX", help="side of the pictures (default: 1024)"
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Arithmetic alone; needs no service and no card."""
    if not args.cards and (args.vram is None or not 0 < args.vram < _MOST_GIB):
        raise wrong("--vram", "give the card's memory in GiB, such as --vram 12, or --cards")
    if not _SIDE_MULTIPLE_PX <= args.side <= _LONGEST_SIDE_PX or args.side % _SIDE_MULTIPLE_PX:
        what = f"a multiple of {_SIDE_MULTIPLE_PX} up to {_LONGEST_SIDE_PX}"
        raise wrong("--side", f"--side {args.side}: {what} is wanted")
    for profile, gib in CARDS.items() if args.cards else [("default", args.vram)]:
        terminal.result(f"# {gib:g} GiB, pictures of {args.side}x{args.side} in bfloat16:")
        for line in as_toml(advise(gib * 2**30, args.side), profile):
            terminal.result(line)
