"""`zimage-client completion`: what a shell needs to complete our commands and flags."""

from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import shtab

from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("shell", nargs="?", choices=shtab.SUPPORTED_SHELLS, metavar="SHELL")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Prints the script; needs no service."""
    if args.shell is None:
        raise wrong("SHELL", f"give one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    for parser in _parsers(args.parser):
        for action in parser._actions:  # argparse has no other way to look
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    terminal.result(shtab.complete(args.parser, args.shell))


def _parsers(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for choice in action.choices.values():
                yield from _parsers(choice)
