"""A service's command line: from flags to a running service, and an error to one line."""

import asyncio
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import TypeVar

from zimage_core import settings, tracing
from zimage_core.errors import InvalidSettings, ZImageError
from zimage_core.serving import logs
from zimage_core.serving.server import Service, serve

S = TypeVar("S", bound=settings.ServiceSettings)


def run(
    service: Callable[[S], Service], settings_model: type[S], argv: Sequence[str] | None = None
) -> int:
    """Runs the service that `service` makes of the settings; the exit code is 0 after a drain, 2
    for wrong settings and 1 for whatever else makes serving pointless."""
    program = next(name for name, known in settings.PROGRAMS.items() if known is settings_model)
    parser = ArgumentParser(
        prog=f"python -m {program}_service", description=settings_model.__doc__, allow_abbrev=False
    )
    settings.add_flags(parser, settings_model)
    flags = vars(parser.parse_args(argv))
    try:
        loaded = settings.load(settings_model, flags)
        if flags["print_config"]:
            sys.stdout.write(str(loaded))
            return 0
        logs.configure()
        with tracing.collected(f"zimage-{program}", loaded.values.traces):
            asyncio.run(serve(service(loaded.values), loaded.values))
    except ZImageError as error:
        sys.stderr.write(f"{parser.prog}: {error.message}\n")
        return 2 if isinstance(error, InvalidSettings) else 1
    except KeyboardInterrupt:  # the second Ctrl-C, while draining
        return 130
    return 0
