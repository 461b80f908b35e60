"""`zimage-client tokens`: how long a prompt is, before anything is run."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from zimage_client import TokenCount
from zimage_client.cli import prompt, stack
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.embeddings import Prompt
from zimage_core.settings import ClientSettings

_DONE, _REFUSED = 0, 3


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to count")
    prompt.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """The count, with what would become of the prompt."""
    # Not left to argparse, because --print-config needs none.
    if args.prompt is None:
        raise wrong("PROMPT", "give a PROMPT")
    given = prompt.prompt(args)
    async with stack.for_prompts(settings, terminal) as client:
        [count] = await client.count_tokens([given])
    terminal.result(json.dumps(asdict(count)) if args.json else _told(given, count))
    return _DONE if count.row_count else _REFUSED


def _told(given: Prompt, count: TokenCount) -> str:
    said = f"{count.token_count} tokens"
    if not count.row_count:
        return f"{said}: too long, {count.token_limit} are allowed"
    if count.row_count == count.token_count:
        return f"{said} of {count.token_limit}"
    return f"{said} of {count.token_limit}: {given.effective_mode} leaves {count.row_count} rows"
