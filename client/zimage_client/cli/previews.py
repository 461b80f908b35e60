"""Previews as the command line shows them: as files in a folder, or in the terminal."""

import glob
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from zimage_client import Options, Preview
from zimage_client.cli.output import Outputs
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.files import write_whole
from zimage_core.wire import names

_TERMINAL = "terminal"

Show = Callable[[Preview], None]


def add_flags(parser: ArgumentParser) -> None:
    """The flags about previews."""
    group = parser.add_argument_group("previews")
    group.add_argument(
        "--preview",
        metavar="DIR|terminal",
        help="show where a picture is heading: as files in a folder, or here",
    )
    group.add_argument(
        "--preview-source",
        choices=tuple(names.PREVIEWS),
        help="latents cost nothing; the vae draws exactly, and takes as long as for a picture each "
        "time (default: auto)",
    )
    group.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help="after every N steps but the last (default 1)",
    )


def options(args: Namespace) -> Options:
    """What the request says of them."""
    if args.preview is None:
        for name in ("preview_source", "preview_every"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise wrong(flag, f"{flag} has no effect without --preview")
        return {}
    return {"previews": args.preview_source or "auto", "preview_interval": args.preview_every}


def shown(args: Namespace, outputs: Outputs, terminal: Terminal) -> Show:
    """What to do with a preview; raises InvalidSettings when it cannot be shown."""
    if args.preview == _TERMINAL:
        if not terminal.shows_pictures:
            raise wrong(
                "--preview",
                "this terminal cannot show pictures: it speaks neither kitty's nor iTerm2's way "
                "and names no 24-bit colours in COLORTERM; --preview DIR writes files",
            )
        return lambda preview: terminal.picture(preview.data, (preview.width, preview.height))
    folder = Path(args.preview or "")
    if args.preview is not None:
        _prepare(folder, outputs, overwrite=args.overwrite)

    def write(preview: Preview) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{outputs.paths[preview.index].stem}-step-{preview.step:03}.png"
        write_whole(folder / name, preview.data)

    return write


def _prepare(folder: Path, outputs: Outputs, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise wrong("--preview", f"{folder} is a file; name a folder, or say terminal")
    for path in outputs.paths:
        found = sorted(folder.glob(f"{glob.escape(path.stem)}-step-*.png"))
        if found and not overwrite:
            raise wrong("--preview", f"{found[0]} exists; choose another folder or add --overwrite")
