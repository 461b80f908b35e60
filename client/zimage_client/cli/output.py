"""Where pictures go, decided before anything runs."""

import os
from dataclasses import dataclass
from pathlib import Path

from zimage_client.cli.usage import wrong

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_MOST_PICTURES = 10_000  # far above what a server takes, and few enough to look for all files
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """One file for each picture, and what they are."""

    paths: tuple[Path, ...]
    format: str


def for_pictures(
    output: Path | None, picture_format: str | None, seed: int, count: int, *, overwrite: bool
) -> Outputs:
    """The files of a request; raises InvalidSettings when one of them cannot be written."""
    if count > _MOST_PICTURES:
        raise wrong("--count", f"--count {count}: {_MOST_PICTURES} pictures are the most at once")
    known = _format_of(output) if output else None
    if known and picture_format not in (None, known):
        raise wrong("--format", f"--format {picture_format} does not fit {output}")
    chosen = picture_format or known or "png"
    first = output or Path(f"zimage-{seed}{_SUFFIXES[chosen]}")
    if count > 1:
        paths = tuple(first.with_stem(f"{first.stem}-{index}") for index in range(count))
    else:
        paths = (first,)
    for path in paths:
        check(path, overwrite=overwrite)
    return Outputs(paths, chosen)


def _format_of(output: Path) -> str | None:
    """The format that a name promises; None for a name without a suffix."""
    suffix = output.suffix.lower()
    if suffix and suffix not in _FORMATS:
        raise wrong(
            "--output", f"{output} is no name of a picture; known are {', '.join(_FORMATS)}"
        )
    return _FORMATS.get(suffix)


def check(path: Path, *, overwrite: bool) -> None:
    """Raises InvalidSettings unless the file can be written."""
    if path.is_dir():
        raise wrong("--output", f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise wrong("--output", f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise wrong("--output", f"the folder {path.parent} cannot be written to")
    if path.exists() and not overwrite:
        raise wrong("--output", f"{path} exists; choose another name or add --overwrite")
