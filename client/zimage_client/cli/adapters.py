"""`zimage-client adapters`: LoRAs by names that a service knows; and how pictures ask for them."""

import argparse
import json
from argparse import ArgumentParser, Namespace
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path

from zimage_client import Adapter, AsyncClient
from zimage_client.cli import stack
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings

_SUFFIX = ".safetensors"
_SHORT_DIGEST = 12


def add_flags(parser: ArgumentParser) -> list[ArgumentParser]:
    """What can be done, each with its arguments; the settings go with these."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in (
        ("add", "give a LoRA a name; its file goes to the service"),
        ("list", "list those that have names"),
        ("show", "show what is known of one"),
        ("remove", "take a name away"),
    ):
        of_action = actions.add_parser(
            action, help=purpose, description=purpose, allow_abbrev=False
        )
        if action != "list":
            of_action.add_argument("name", metavar="NAME")
        of_action.add_argument(
            "--json", action="store_true", help="one JSON object a line on stdout"
        )
        if action == "add":
            of_action.add_argument(
                "file", type=Path, metavar="FILE", help="a safetensors file, or a folder of peft"
            )
            of_action.add_argument(
                "--replace", action="store_true", help="also if the name has another file"
            )
    return list(actions.choices.values())


def add_use_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of pictures."""
    parser.add_argument(
        "--adapter",
        action="append",
        type=_use,
        metavar="NAME[:SCALE]",
        help="change the model by a LoRA, 1 as it was trained; a name that the service knows, or a "
        "file; may be given several times",
    )


def uses(args: Namespace) -> dict[str | Path, float] | None:
    """The adapters that pictures are asked for with; None where none were given."""
    if not args.adapter:
        return None
    found: dict[str | Path, float] = {}
    for source, scale in args.adapter:
        if source in found:
            raise wrong("--adapter", f"--adapter {source} is given twice")
        if isinstance(source, Path) and not source.exists():
            raise wrong("--adapter", f"--adapter {source}: there is no such file")
        found[source] = scale
    return found


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Does the one thing."""
    async with _client(settings, terminal) as client:
        match args.action:
            case "add":
                terminal.live(f"sending {args.file}")
                adapter = await client.add_adapter(args.name, args.file, replace=args.replace)
                terminal.clear()
                _show(adapter, args, terminal)
            case "list":
                for adapter in await client.list_adapters():
                    line = f"{adapter.name}  {_size(adapter)}  {adapter.sha256[:_SHORT_DIGEST]}"
                    terminal.result(json.dumps(asdict(adapter)) if args.json else line)
            case "show":
                _show(await client.get_adapter(args.name), args, terminal)
            case "remove":
                await client.remove_adapter(args.name)


def _client(
    settings: ClientSettings, terminal: Terminal
) -> AbstractAsyncContextManager[AsyncClient]:
    return stack.for_pictures(settings.model_copy(update={"encoder": ""}), terminal)


def _show(adapter: Adapter, args: Namespace, terminal: Terminal) -> None:
    if args.json:
        terminal.result(json.dumps(asdict(adapter)))
        return
    changed = f"rank {adapter.rank}, changes {adapter.linear_count} linears"
    terminal.result(f"{adapter.name}  {_size(adapter)}  {changed}")
    terminal.result(f"  sha256: {adapter.sha256}")
    for name, text in sorted(adapter.metadata.items()):
        terminal.result(f"  {name}: {' '.join(text.split())}")


def _size(adapter: Adapter) -> str:
    return f"{adapter.size_bytes / 1e6:.1f} MB"


def _use(text: str) -> tuple[str | Path, float]:
    """A scale stands behind the last colon; what is no number there belongs to the name."""
    source, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon else 1.0
    except ValueError:
        colon, scale = "", 1.0
    if not colon:
        source = text
    if not source:
        raise argparse.ArgumentTypeError(f"{text!r} names no adapter")
    is_file = source.endswith(_SUFFIX) or "/" in source or "\\" in source
    return (Path(source) if is_file else source), scale
