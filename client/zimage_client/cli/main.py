"""`zimage-client`: the command line. The only part of the client that reads the environment."""

import asyncio
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.metadata import version
from io import TextIOWrapper

from zimage_client.cli import (
    adapters,
    advise,
    cache,
    certs,
    completion,
    doctor,
    down,
    encode,
    generate,
    info,
    inline,
    inspect,
    jobs,
    models,
    plan,
    profile,
    tokens,
    trace,
    train,
    up,
    verify,
    verify_encoder,
)
from zimage_client.cli.terminal import Terminal
from zimage_core import settings, tracing
from zimage_core.errors import (
    Cancelled,
    DeadlineTooShort,
    InternalError,
    InvalidSettings,
    Unavailable,
    ZImageError,
)
from zimage_core.settings import ClientSettings

_COMMANDS = {
    "generate": (generate, "make pictures from a prompt or an encoded one"),
    "encode": (encode, "encode a prompt into a file"),
    "adapters": (adapters, "keep LoRAs under names that pictures can ask for"),
    "advise": (advise, "print settings that suit a card, and what takes its memory"),
    "completion": (completion, "print what a shell needs to complete commands and flags"),
    "info": (info, "show what the services are, configured or embedded, and how they are"),
    "inspect": (inspect, "show what a picture's file says of how it was made"),
    "up": (up, "start the embedded services and leave them running"),
    "down": (down, "stop the embedded services"),
    "doctor": (doctor, "try every link to the services and say what to change"),
    "certs": (certs, "make a private authority, and certificates for machines"),
    "plan": (plan, "print what a training takes of a card's memory, and the fastest way that fits"),
    "models": (models, "fetch models for the services of this machine, and check them"),
    "profile": (profile, "measure encoding, steps and pictures, and compare ways to compute"),
    "train": (train, "teach a LoRA from pictures and captions"),
    "cache": (cache, "fill, look at and clear what trainings keep of captions and pictures"),
    "jobs": (jobs, "show, watch, pause, resume and export trainings"),
    "tokens": (tokens, "count a prompt's tokens, and say whether it would be cut or compressed"),
    "trace": (trace, "show what the device of a running DiT service did, and for whom"),
    "verify": (verify, "make a picture again and say whether it is the same"),
    "verify-encoder": (
        verify_encoder,
        "compare what two encoders make of the same prompts",
    ),
}
_WITH_JOB_FILES = ("cache", "train")
"""Whose --config is that of a job."""
_DONE, _FAILED, _USAGE, _REFUSED, _UNREACHABLE, _INTERRUPTED = 0, 1, 2, 3, 4, 130
_EXIT_CODES: dict[type[ZImageError], int] = {
    InvalidSettings: _USAGE,
    Unavailable: _UNREACHABLE,
    DeadlineTooShort: _FAILED,
    Cancelled: _FAILED,
    InternalError: _FAILED,
    ZImageError: _REFUSED,
}
_HINTS = {
    "UNREACHABLE": "is the service running, and is that where --server or --encoder say? "
    "`zimage-client doctor` tries every link",
    "UNIMPLEMENTED": "--server is for a DiT service, --encoder for an encoder service",
    "INTERNAL": "the service's log knows more",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its notes would run into the live line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text must not break its own printing
    args = _parser().parse_args(arguments)
    terminal = Terminal(sys.stdout, sys.stderr, inline.way(os.environ))
    try:
        with terminal.shows_warnings():
            return _run(args, terminal)
    except KeyboardInterrupt:
        terminal.note("interrupted")
        return _INTERRUPTED
    except ZImageError as error:
        if getattr(args, "json", False):
            told = {"error": error.message, "reason": error.reason, "fields": dict(error.fields)}
            terminal.result(json.dumps(told))
        terminal.note(_explained(error))
        return next(code for cls, code in _EXIT_CODES.items() if isinstance(error, cls))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except OSError as error:
        terminal.note(f"error: {error}")
        return _FAILED


def _run(args: Namespace, terminal: Terminal) -> int:
    loaded = settings.load(ClientSettings, vars(args))
    if args.print_config:
        terminal.result(str(loaded).rstrip())
        return _DONE
    command, _ = _COMMANDS[args.command]
    with tracing.collected("zimage-client", loaded.values.traces):
        return asyncio.run(command.run(args, loaded.values, terminal)) or _DONE


def _explained(error: ZImageError) -> str:
    """The error in the words of whoever raised it, with what to do next where that helps."""
    hint = _HINTS.get(error.reason)
    id_given = error.fields.get("request_id")
    return "\n".join(
        [
            f"error: {error.message}" + (f" (request {id_given})" if id_given else ""),
            *([hint] if hint else []),
            *getattr(error, "__notes__", ()),
        ]
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="zimage-client", description="Makes pictures with Z-Image.", allow_abbrev=False
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=version("zimage-grpc"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (command, purpose) in _COMMANDS.items():
        of_command = commands.add_parser(
            name, help=purpose, description=purpose, allow_abbrev=False
        )
        for parsed in command.add_flags(of_command) or [of_command]:
            flag = "--settings" if name in _WITH_JOB_FILES else "--config"
            settings.add_flags(parsed, ClientSettings, flag)
    return parser


if __name__ == "__main__":
    sys.exit(main())
