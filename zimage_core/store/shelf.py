"""Files under keys, in a folder or behind any URL that fsspec knows. Each appears whole or not at
all."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from zimage_core.errors import InvalidSettings
from zimage_core.files import write_whole


@dataclass(frozen=True, slots=True)
class Entry:
    """A file on the shelf."""

    key: str
    size_bytes: int
    modified: float
    """Seconds since 1970."""


class Shelf:
    """Keys are paths with slashes; who may write them sees to it that they are harmless."""

    def __init__(self, url: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(os.path.expanduser(url))
        except (ImportError, ValueError) as error:  # the library of that kind is not there
            raise InvalidSettings(
                f"store {url}: {error}", reason="STORE", fields={"field": "store", "given": url}
            ) from error
        self._root = root.rstrip("/")
        self.folder = Path(self._root) if isinstance(self._files, LocalFileSystem) else None
        """Where it is, if it is a folder of this machine."""

    def size(self, key: str) -> int | None:
        """In bytes; None where there is no such file."""
        try:
            return int(self._files.info(self._path(key))["size"])
        except FileNotFoundError:
            return None

    def open(self, key: str) -> BinaryIO:
        """For reading, anywhere; raises FileNotFoundError."""
        return cast("BinaryIO", self._files.open(self._path(key), "rb"))

    def take(self, file: Path, key: str) -> None:
        """Moves a file of this machine here. One in the shelf's own folder is only renamed."""
        if self.folder is None:
            self._files.put_file(str(file), self._path(key))
            file.unlink()
            return
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(file, target)
        except OSError:  # it lies on another disk
            beside = target.with_name(f".{target.name}.new")
            shutil.move(file, beside)
            os.replace(beside, target)

    def write(self, key: str, data: bytes) -> None:
        """A small file, at once."""
        if self.folder is None:
            self._files.pipe_file(self._path(key), data)
            return
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)

    def read(self, key: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            return cast("bytes", self._files.cat_file(self._path(key)))
        except FileNotFoundError:
            return None

    def entries(self, folder: str) -> Iterator[Entry]:
        """All files below."""
        try:
            found = self._files.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            modified = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
            seconds = modified if isinstance(modified, int | float) else modified.timestamp()
            yield Entry(path.removeprefix(f"{self._root}/"), int(info["size"]), float(seconds))

    def touch(self, key: str) -> None:
        """Says that a file is in use, where the place can say so."""
        if self.folder is not None:
            os.utime(self.folder / key)

    def remove(self, key: str) -> None:
        """Without effect where there is none."""
        try:
            self._files.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"
