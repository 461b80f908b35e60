"""Blobs by digest, and names that point at them.

What comes in is gathered in a file of this machine, where it stays after a break; once it is whole
and is what its digest says, it moves to the shelf. What no name points at goes when it is old, or
when there is no room.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from zimage_core import digests
from zimage_core.errors import InvalidRequest, NotFound, Overloaded
from zimage_core.store.incoming import Incoming
from zimage_core.store.shelf import Entry, Shelf, on_disk

_log = logging.getLogger(__name__)

_BLOBS, _NAMES = "blobs", "names"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IN_USE_SECONDS = 600.0
"""What came or was read so lately may be about to get a name."""
_MOST_PARTS = 1000
"""Beginnings that nobody goes on with; each costs a look at every put."""
_LONGEST_MAKING_SECONDS = 86_400.0
_COPY_BYTES = 1 << 20
_LOOK_SECONDS = 60.0
"""How long we believe what we saw on the shelf, which others may use, too."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is there of a blob."""

    complete: bool
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A blob that a name points at."""

    name: str
    sha256: str
    size_bytes: int
    """0 where it is not there."""
    used: float
    """When it was last, in seconds since 1970, where the place knows; else when it came."""


class Blobs:
    """Those of one store. All of it may wait for disks and networks: call it from threads."""

    def __init__(self, url: str, scratch: Path, quota_bytes: int, keep_seconds: float) -> None:
        """What comes in for a store that is no folder of this machine is gathered in `scratch`.
        What no name points at is kept for so long after it was last used."""
        self._shelf = Shelf(url)
        self._quota = quota_bytes
        self._keep_seconds = keep_seconds
        # On the same disk where possible, so that what is whole is only renamed.
        self._gathering = (self._shelf.folder or scratch) / "incoming"
        self._making = (self._shelf.folder or scratch) / "making"
        self._copies = scratch / "copies"
        self._verified: dict[str, int] = {}
        """The files that were what their digests say, by their inodes."""
        self._incoming: dict[str, Incoming] = {}
        self._registry = threading.Lock()
        """For the line above; held for no disk and no network."""
        self._making_room = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._looked_at = float("-inf")

    def find(self, sha256: str) -> Found:
        """What is there of a blob."""
        size = self._shelf.size(_key(sha256))
        if size is not None:
            return Found(complete=True, stored_bytes=size)
        return Found(complete=False, stored_bytes=_size(self._gathering / sha256))

    def open(self, sha256: str) -> BinaryIO:
        """A blob for reading; raises NotFound."""
        key = _key(sha256)
        try:
            file = self._shelf.open(key)
        except FileNotFoundError:
            raise _missing(sha256) from None
        self._shelf.touch(key)
        return file

    def local(self, sha256: str) -> Path:
        """A blob as a file of this machine, which is what its digest says; raises NotFound. Where
        the store is elsewhere, copies of late are kept, as many as may lie on the shelf."""
        key = _key(sha256)
        if self._shelf.folder is not None:
            path = self._shelf.folder / key
            self._shelf.touch(key)
            is_right = self._is_right(sha256, path)
        else:
            path = self._copies / sha256
            is_right = path.exists() and self._is_right(sha256, path)
            if not is_right:  # or no more: what a machine lost power over is half written
                self._copy(sha256, path)
                is_right = self._is_right(sha256, path)
        if not is_right:
            path.unlink(missing_ok=True)
            self.discard(sha256)
            raise _missing(sha256)
        return path

    def receive(self, sha256: str, size_bytes: int) -> Incoming | None:
        """Goes on with a blob, in the place of whoever did so before; None for one that is there.
        Raises Overloaded where there is no room, Unavailable while it is being completed."""
        key = _key(sha256)
        if size_bytes < 0:
            raise InvalidRequest.given("start.size_bytes", size_bytes, "0 or more", "BLOB_SIZE")
        if (there := self._shelf.size(key)) is not None:
            if there != size_bytes:
                raise InvalidRequest.given("start.size_bytes", size_bytes, f"{there}", "BLOB_SIZE")
            self._shelf.touch(key)
            return None
        with self._registry:
            before = self._incoming.get(sha256)
        if before and not before.is_finishing:
            before.close()
        with self._making_room:
            self._make_room(sha256, size_bytes)
            with on_disk():
                self._gathering.mkdir(parents=True, exist_ok=True, mode=0o700)
            incoming = Incoming(self._gathering / sha256, size_bytes, self._gone)
            with self._registry:
                self._incoming[sha256] = incoming
        return incoming

    def complete(self, sha256: str, incoming: Incoming) -> None:
        """Lets everybody see a blob that is whole; raises InvalidRequest for one that is not."""
        incoming.finish(lambda path: self._shelf.take(path, _key(sha256)))
        self._sizes[sha256] = incoming.size_bytes

    @contextmanager
    def making(self) -> Iterator[Path]:
        """A folder of this machine for files that become blobs; it is gone afterwards."""
        with on_disk():
            self._making.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in self._making.iterdir():  # by a process that was killed
                if time.time() - _modified(left) > _LONGEST_MAKING_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=self._making))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, path: Path) -> tuple[str, int]:
        """Moves a whole file here, and says its digest and size; raises Overloaded where there is
        no room."""
        with on_disk(), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            os.fsync(file.fileno())
        key = _key(sha256)
        if self._shelf.size(key) == size:
            self._shelf.touch(key)
            return sha256, size
        with self._making_room:
            self._make_room(sha256, size)
            self._shelf.take(path, key)
            self._sizes[sha256] = size
        return sha256, size

    def keep(self, sha256: str, data: bytes) -> None:
        """A small blob that is here already; raises what `receive` and `complete` raise."""
        incoming = self.receive(sha256, len(data))
        if incoming is not None:
            with closing(incoming):
                incoming.add(data[incoming.stored_bytes :])
                self.complete(sha256, incoming)

    def discard(self, sha256: str) -> None:
        """Takes away what is not what its digest says; whoever brings it again is welcome."""
        self._shelf.remove(_key(sha256))
        self._sizes.pop(sha256, None)
        _log.error("blob %s was not what its digest says, and went", sha256)

    def point(self, kind: str, name: str, sha256: str) -> None:
        """Lets a name point at a blob, which stays as long as it does; raises NotFound."""
        key = _name_key(kind, name)
        self._shelf.touch(_key(sha256))  # so that no sweep takes it meanwhile
        self._shelf.write(key, json.dumps({"sha256": sha256}).encode())
        if self._shelf.size(_key(sha256)) is None:
            self._shelf.remove(key)
            raise _missing(sha256)

    def pointed_at(self, kind: str, name: str) -> str:
        """The digest of the blob that a name points at; raises NotFound."""
        data = self._shelf.read(_name_key(kind, name))
        if data is None:
            raise NotFound(f"there is no {kind} {name}", fields={"field": kind, "given": name})
        try:
            return str(json.loads(data)["sha256"])
        except (ValueError, KeyError, TypeError):
            said = f"{kind} {name} cannot be read"
            raise NotFound(said, fields={"field": kind, "given": name}) from None

    def names(self, kind: str) -> list[str]:
        """All of a kind."""
        return sorted(_last(entry.key) for entry in self._shelf.entries(_kind_key(kind)))

    def kept(self, kind: str) -> Iterator[Kept]:
        """All names of a kind, with what they point at."""
        names = self.names(kind)  # before the blobs: a new name has one that is there already
        entries = {_last(entry.key): entry for entry in self._shelf.entries(_BLOBS)}
        for name in names:
            try:
                sha256 = self.pointed_at(kind, name)
            except NotFound:  # taken away just now, or torn
                sha256 = ""
            entry = entries.get(sha256, Entry("", 0, 0.0))
            yield Kept(name, sha256, entry.size_bytes, entry.modified)

    def verify(self, sha256: str) -> bool:
        """Whether a blob is there and, read anew, what its digest says; it goes where it is not."""
        self._verified.pop(sha256, None)
        try:
            digest = hashlib.sha256()
            with self._shelf.open(_key(sha256)) as file, on_disk():
                while data := file.read(_COPY_BYTES):
                    digest.update(data)
        except FileNotFoundError:
            return False
        is_right = digest.hexdigest() == sha256
        if not is_right:
            self.discard(sha256)
        return is_right

    def forget(self, kind: str, name: str) -> None:
        """Takes a name away; its blob goes when nothing else points at it and it is old."""
        self._shelf.remove(_name_key(kind, name))

    def sweep(self, wanted_bytes: int = 0) -> None:
        """Removes what no name points at and nobody used for long; if so many bytes are wanted that
        there is no room, of what was not used of late as much more: beginnings that nobody goes on
        with, then the oldest first."""
        entries = sorted(self._shelf.entries(_BLOBS), key=_age)
        kept = self._pointed_at()
        self._sizes = {_last(entry.key): entry.size_bytes for entry in entries}
        self._looked_at = time.monotonic()
        now = time.time()
        loose = [*self._loose_parts(), *(e for e in entries if _last(e.key) not in kept)]
        old = [entry for entry in loose if now - entry.modified > self._keep_seconds]
        unused = [entry for entry in loose if now - entry.modified > _IN_USE_SECONDS]
        for entry in old:
            self._remove(entry)
        too_much = self._used_bytes + wanted_bytes - self._quota
        if too_much <= 0 or sum(entry.size_bytes for entry in unused) < too_much:
            return  # there is room, or all that could go would not make it
        for entry in unused:
            if self._used_bytes + wanted_bytes > self._quota:
                self._remove(entry)

    def _is_right(self, sha256: str, path: Path) -> bool:
        """Whether a file is what its digest says; raises NotFound where there is none."""
        try:
            with on_disk(), path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino  # a file here is replaced, never changed
                if self._verified.get(sha256) != inode:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        return False
                    self._verified[sha256] = inode
        except FileNotFoundError:
            raise _missing(sha256) from None
        return True

    def _copy(self, sha256: str, path: Path) -> None:
        with on_disk():
            self._copies.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f".{secrets.token_hex(8)}")
        try:
            with self.open(sha256) as there, on_disk(), part.open("xb") as here:
                shutil.copyfileobj(there, here, _COPY_BYTES)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        whole = (copy for copy in self._copies.iterdir() if not copy.name.startswith("."))
        copies = sorted(whole, key=_modified, reverse=True)
        sizes = accumulate(_size(copy) for copy in copies)
        for copy, size in zip(copies, sizes, strict=True):
            if size > self._quota and copy != path:
                copy.unlink(missing_ok=True)

    def _pointed_at(self) -> set[str]:
        """Raises ValueError for a name that nobody can read: then nothing may go."""
        kept = set()
        for entry in self._shelf.entries(_NAMES):
            data = self._shelf.read(entry.key)
            if data is not None:  # else it was taken away just now
                kept.add(str(json.loads(data)["sha256"]))
        return kept

    def _remove(self, entry: Entry) -> None:
        """A blob, or a beginning."""
        sha256 = _last(entry.key)
        if entry.key == sha256:
            (self._gathering / sha256).unlink(missing_ok=True)
        elif sha256 in self._sizes:
            self._shelf.remove(entry.key)
            del self._sizes[sha256]
            _log.info("blob %s went: nothing points at it", sha256)

    def _make_room(self, sha256: str, size_bytes: int) -> None:
        if size_bytes > self._quota:
            raise self._full(size_bytes)
        for part in self._loose_parts()[:-_MOST_PARTS]:
            self._remove(part)
        wanted = size_bytes - _size(self._gathering / sha256)
        is_short = self._used_bytes + wanted > self._quota
        if is_short or time.monotonic() - self._looked_at > _LOOK_SECONDS:
            try:
                self.sweep(wanted)
            except (ValueError, KeyError, TypeError):
                _log.exception("the store has a name that cannot be read: nothing goes")
        if self._used_bytes + wanted > self._quota:
            raise self._full(size_bytes)

    def _full(self, size_bytes: int) -> Overloaded:
        return Overloaded(
            f"there is no room for a blob of {size_bytes} bytes: {self._used_bytes} of "
            f"{self._quota} are taken",
            reason="STORE_FULL",
            fields={"given": str(size_bytes), "allowed": str(self._quota)},
        )

    @property
    def _used_bytes(self) -> int:
        """On the shelf, of what lies half, and what those under way will need."""
        with self._registry:
            coming = sum(one.size_bytes for one in self._incoming.values())
        return sum(self._sizes.values()) + coming + sum(p.size_bytes for p in self._loose_parts())

    def _loose_parts(self) -> list[Entry]:
        """Beginnings that no call goes on with, the oldest first."""
        if not self._gathering.is_dir():
            return []
        with self._registry:
            names = [p.name for p in self._gathering.iterdir() if p.name not in self._incoming]
        parts = [
            Entry(name, _size(self._gathering / name), _modified(self._gathering / name))
            for name in names
        ]
        return sorted(parts, key=_age)

    def _gone(self, incoming: Incoming) -> None:
        with self._registry:
            for sha256, one in list(self._incoming.items()):
                if one is incoming:
                    del self._incoming[sha256]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _age(entry: Entry) -> float:
    return entry.modified


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _missing(sha256: str) -> NotFound:
    return NotFound(
        f"there is no blob {sha256}", reason="BLOB_NOT_FOUND", fields={"sha256": sha256}
    )


def _key(sha256: str) -> str:
    digests.check(sha256, "sha256")
    return f"{_BLOBS}/{sha256[:2]}/{sha256}"


def check_name(name: str, field: str = "name") -> str:
    """Raises InvalidRequest for what cannot be a name."""
    if not _NAME.fullmatch(name):
        allowed = "letters, digits, '.', '_', '-', 128 at most, a letter or digit first"
        raise InvalidRequest.given(field, name[:200] or "nothing", allowed, "NAME")
    return name


def _name_key(kind: str, name: str) -> str:
    return f"{_kind_key(kind)}/{check_name(name)}"


def _kind_key(kind: str) -> str:
    return "/".join((_NAMES, *map(check_name, kind.split("/"))))
