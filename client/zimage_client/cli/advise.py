"""`zimage-client advise`: the settings that suit a card, as a settings file."""

from argparse import ArgumentParser, Namespace

from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.planning.advice import advise, as_toml
from zimage_core.settings import ClientSettings

_SIDE_MULTIPLE_PX = 16
_LONGEST_SIDE_PX = 4096


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "--vram", type=float, metavar="GIB", help="memory of the card, as it is sold"
    )
    parser.add_argument(
        "--side", type=int, default=1024, metavar="PX", help="side of the pictures (default: 1024)"
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Arithmetic alone; needs no service and no card."""
    if args.vram is None or not 0 < args.vram < 10_000:
        raise wrong("--vram", "give the card's memory in GiB, such as --vram 12")
    if not _SIDE_MULTIPLE_PX <= args.side <= _LONGEST_SIDE_PX or args.side % _SIDE_MULTIPLE_PX:
        what = f"a multiple of {_SIDE_MULTIPLE_PX} up to {_LONGEST_SIDE_PX}"
        raise wrong("--side", f"--side {args.side}: {what} is wanted")
    advice = advise(args.vram * 2**30, args.side)
    terminal.result(f"# {args.vram:g} GiB, pictures of {args.side}x{args.side}, bfloat16")
    for line in as_toml(advice, "default"):
        terminal.result(line)
