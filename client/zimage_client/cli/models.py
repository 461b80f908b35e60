"""`zimage-client models`: models for the services of this machine."""

import json
import signal
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from zimage_client import _models, _sources
from zimage_client._models import Kept, Models, Told
from zimage_client._sources import SourceFile
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.settings import ClientSettings

_TORN = 1
_DIGITS = 12
_WORTH_TELLING_SECONDS = 2.0


def add_flags(parser: ArgumentParser) -> list[ArgumentParser]:
    """What can be done, each with its arguments; the settings go with these."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in (
        ("add", "fetch what a service needs of a model, and go on where that ended"),
        ("list", "show what is here"),
        ("verify", "read all of it; what is not what came goes, and `add` fetches it"),
        ("remove", "take it away"),
    ):
        of_action = actions.add_parser(
            action, help=purpose, description=purpose, allow_abbrev=False
        )
        of_action.add_argument(
            "--json", action="store_true", help="one JSON object a model on stdout"
        )
        if action == "add":
            _add_flags_of_add(of_action)
        elif action != "list":
            of_action.add_argument("model", metavar="MODEL", help="as `models list` names it")
    return list(actions.choices.values())


def _add_flags_of_add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="REPO|PATH",
        help="a repository, OWNER/NAME, at the hub that HF_ENDPOINT names (HF_TOKEN for private "
        "ones); or a folder or file",
    )
    parser.add_argument(
        "--parts",
        metavar="PART,...",
        help=f"{' or '.join(_models.PARTS)}: what the services of this machine need; default: both",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="NAME",
        help="this file of it instead, such as a single file of weights; may be repeated",
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int | None:
    """Does the one thing."""
    # Nothing here waits for events, so that Ctrl-C must end what goes on and not a task.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    models = Models(settings.models_folder)
    match args.action:
        case "add":
            _show(_add(models, args, terminal), args, terminal)
        case "list":
            for kept in models.all():
                _show(kept, args, terminal)
        case "remove":
            kept = models.get(args.model)
            models.remove(kept)
            _show(kept, args, terminal)
        case "verify":
            return _verify(models, args, terminal)
    return None


def _add(models: Models, args: Namespace, terminal: Terminal) -> Kept:
    terminal.live(f"asking for the files of {args.model}")
    source = _sources.source(args.model, args.revision)
    want = _models.wanted(source, _parts(args), args.file)
    missing = models.missing(want)
    size = sum(file.size_bytes for file in missing)
    at = f" at {source.revision[:_DIGITS]}" if source.revision else ""
    terminal.note(f"{source.name}{at}: {len(missing)} files to fetch, {_gigabytes(size)}")
    return models.add(want, _progress(terminal, size))


def _parts(args: Namespace) -> tuple[str, ...]:
    if args.parts is None:
        return _models.PARTS
    parts = tuple(part.strip() for part in args.parts.split(","))
    if unknown := set(parts) - set(_models.PARTS):
        allowed = ", ".join(_models.PARTS)
        raise wrong("--parts", f"--parts {', '.join(sorted(unknown))}: allowed are {allowed}")
    return parts


def _verify(models: Models, args: Namespace, terminal: Terminal) -> int | None:
    kept = models.get(args.model)
    torn = models.verify(kept, lambda file, _: terminal.live(f"reading {file.name}"))
    models.forget(kept, torn)
    if args.json:
        terminal.result(json.dumps({"model": kept.name, "torn": torn}))
    else:
        terminal.result("\n".join([f"{kept.name}: {len(torn)} files torn or missing", *torn]))
    return _TORN if torn else None


def _show(kept: Kept, args: Namespace, terminal: Terminal) -> None:
    if args.json:
        said: dict[str, Any] = {
            "model": kept.name,
            "path": str(kept.served),
            "parts": kept.parts,
            "revision": kept.revision,
            "bytes": kept.size_bytes,
        }
        terminal.result(json.dumps(said))
        return
    parts = ", ".join(kept.parts)
    revision = kept.revision[:_DIGITS] or "local"
    terminal.result(
        f"{kept.name}  {parts}  {_gigabytes(kept.size_bytes)}  {revision}  {kept.served}"
    )


def _progress(terminal: Terminal, size: int) -> Told:
    """The live line: how far, how fast, and what is left of all files together."""
    began, before, old, last = time.monotonic(), 0, 0, ("", 0)

    def told(file: SourceFile, there: int) -> None:
        nonlocal before, old, last
        if file.name != last[0]:
            before += last[1]
            old += there  # of an earlier attempt
        last = file.name, there
        done, seconds = before + there, time.monotonic() - began
        line = f"{file.name}: {_gigabytes(done)} of {_gigabytes(size)}"
        if seconds > _WORTH_TELLING_SECONDS and done > old:
            pace = (done - old) / seconds
            line += f", {pace / 1e6:.0f} MB/s, about {(size - done) / pace:.0f} s left"
        terminal.live(line)

    return told


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e3:.0f} kB"
