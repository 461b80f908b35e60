"""Where stacks live: folders of the user's own, short enough for the names of sockets."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import platformdirs

from zimage_client._embedded.locks import is_held
from zimage_core.errors import NotReady

_LONGEST_SOCKET_PATH = 103  # bytes: macOS has room for 104, the closing zero included
_LONGEST_NAME = "0.0.0.dev00000-0123456789ab/encoder.sock"
_DIGITS = 12
_FORGOTTEN_SECONDS = 86_400.0

LOCKS = ("starting", "alive", "users")
"""The locks in a stack's folder: of whoever starts it, of its processes, of whoever uses it."""


def runtime_folder() -> Path:
    """The user's folder for such things, if it is theirs alone and leaves room for a socket's name;
    else one among the temporary files."""
    with contextlib.suppress(OSError):
        with warnings.catch_warnings(action="ignore"):  # of having to fall back to /tmp
            folder = platformdirs.user_runtime_path("zimage")
        if _is_short(folder) and _is_own(folder):
            return folder
    folder = Path(tempfile.gettempdir()) / f"zimage-{os.getuid()}"
    if not (_is_short(folder) and _is_own(folder)):
        raise NotReady(
            f"{folder} has too long a name for a socket in it, or belongs to somebody else, too: "
            "set TMPDIR or XDG_RUNTIME_DIR to a short folder of your own",
            reason="RUNTIME_FOLDER",
            fields={"path": str(folder)},
        )
    return folder


def stack_folder(model: Path) -> Path:
    """The folder of this version's stack with the model as it lies there now."""
    folder = runtime_folder() / f"{version('zimage-grpc')}-{model_digest(model)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def model_digest(model: Path) -> str:
    """Changes with the folder's place and with the size and time of every file in it."""
    root = model.resolve()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(root)), path.stat()) for path in files]
    seen = [str(root), [[name, found.st_size, found.st_mtime_ns] for name, found in stats]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:_DIGITS]


def sweep(older_than_seconds: float = _FORGOTTEN_SECONDS) -> None:
    """Removes what stacks of other days have left."""
    for folder in runtime_folder().iterdir():
        locks = (folder / name for name in LOCKS)
        with contextlib.suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > older_than_seconds
            if folder.is_dir() and is_old and not any(map(is_held, locks)):
                shutil.rmtree(folder)


def _is_short(folder: Path) -> bool:
    return len(os.fsencode(folder / _LONGEST_NAME)) <= _LONGEST_SOCKET_PATH


def _is_own(folder: Path) -> bool:
    """Whether nobody else can reach into the folder, which is made if it is missing."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid == os.getuid() and is_private
