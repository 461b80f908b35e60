"""Writing files so that nobody ever sees half of one."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """The file appears complete or not at all, and replaces an older one in one step."""
    scratch = path.with_name(f".zimage-{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(data)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
