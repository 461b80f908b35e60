"""Files that nobody ever sees half of, and files that change while we look."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

Stamp = tuple[int, int, int] | None


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """The file appears complete or not at all, and replaces an older one in one step; `mode` is for
    the umask to narrow."""
    scratch = path.with_name(f".zimage-{secrets.token_hex(8)}")
    try:
        with open(scratch, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def chunks(path: Path, offset: int, size: int = 1 << 20) -> Iterator[bytes]:
    """The file from an offset on."""
    with open(path, "rb") as file:
        file.seek(offset)
        while chunk := file.read(size):
            yield chunk


def stamp(path: Path) -> Stamp:
    """Another one after every change of a file; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
