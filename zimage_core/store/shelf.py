"""Files under keys, in a folder or behind any URL that fsspec knows. Each appears whole or not at
all, and what the disk or the network says against it is an error of ours."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from zimage_core.errors import InvalidSettings, Overloaded, Unavailable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_RETRY_SECONDS = 5.0


@contextmanager
def on_disk() -> Iterator[None]:
    """Raises Overloaded where there is no room, Unavailable for other faults of disk or network.
    That a file is not there is no fault."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise Overloaded("the store's disk is full", reason="STORE_FULL") from error
        raise Unavailable(
            "the store does not answer", reason="STORE_UNAVAILABLE", retry_after=_RETRY_SECONDS
        ) from error


@dataclass(frozen=True, slots=True)
class Entry:
    """A file on the shelf."""

    key: str
    size_bytes: int
    modified: float
    """Seconds since 1970; the present where the place does not tell."""


class Shelf:
    """Keys are paths with slashes; who may write them sees to it that they are harmless."""

    def __init__(self, url: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(
                os.path.expanduser(url), use_listings_cache=False
            )
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
            with self._now():
                return int(self._files.info(self._path(key))["size"])
        except FileNotFoundError:
            return None

    def open(self, key: str) -> BinaryIO:
        """For reading, anywhere; raises FileNotFoundError."""
        with self._now():
            return cast("BinaryIO", self._files.open(self._path(key), "rb"))

    def take(self, file: Path, key: str) -> None:
        """Moves a file of this machine here. One in the shelf's own folder is only renamed."""
        with self._now():
            if self.folder is not None:
                _move(file, self.folder / key)
                return
            beside = f"{self._root}/incoming/{secrets.token_hex(8)}"  # not every kind is atomic
            self._files.put_file(str(file), beside)
            self._files.mv(beside, self._path(key))
            file.unlink()

    def write(self, key: str, data: bytes) -> None:
        """A small file, at once."""
        with self._now():
            if self.folder is None:
                self._files.pipe_file(self._path(key), data)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self.folder / f".{secrets.token_hex(8)}"
            with open(scratch, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _move(scratch, self.folder / key)

    def read(self, key: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            with self._now():
                return cast("bytes", self._files.cat_file(self._path(key)))
        except FileNotFoundError:
            return None

    def entries(self, folder: str) -> Iterator[Entry]:
        """All files below."""
        with self._now(), suppress(FileNotFoundError):
            for path, info in self._files.find(self._path(folder), detail=True).items():
                key = path.removeprefix(f"{self._root}/")
                yield Entry(key, int(info["size"]), self._modified(path, info.get("mtime")))

    def touch(self, key: str) -> None:
        """Says that a file is in use, where the place can say so."""
        if self.folder is not None:
            with suppress(OSError):  # such as a disk that may only be read
                os.utime(self.folder / key)

    def remove(self, key: str) -> None:
        """Without effect where there is none."""
        with self._now(), suppress(FileNotFoundError):
            self._files.rm_file(self._path(key))

    def _modified(self, path: str, known: float | None) -> float:
        if known is not None:
            return float(known)
        try:
            return float(self._files.modified(path).timestamp())
        except NotImplementedError:
            return time.time()

    @contextmanager
    def _now(self) -> Iterator[None]:
        """Others write here, too: what was seen a moment ago counts for nothing."""
        self._files.invalidate_cache()
        with on_disk():
            yield

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


def _move(file: Path, target: Path) -> None:
    """Both are on disk when it returns."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{secrets.token_hex(8)}")
        shutil.move(file, beside)
        os.replace(beside, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
