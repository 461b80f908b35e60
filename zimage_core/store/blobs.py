"""Blobs by digest, and names that point at them.

What comes in is gathered in a file of this machine, where it stays after a break; once it is whole
and is what its digest says, it moves to the shelf. What no name points at goes when it is old, or
when there is no room.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import platformdirs

from zimage_core.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from zimage_core.store.shelf import Shelf

_log = logging.getLogger(__name__)

_BLOBS, _NAMES = "blobs", "names"
_SHA256 = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IN_USE_SECONDS = 600.0
"""What came or was read so lately may be about to get a name."""
_LOOK_SECONDS = 60.0
"""How long we believe what we saw on the shelf, which others may use, too."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is there of a blob."""

    complete: bool
    stored_bytes: int


class Blobs:
    """Those of one store. All of it may wait for disks and networks: call it from threads."""

    def __init__(self, url: str, quota_bytes: int, keep_seconds: float) -> None:
        """What no name points at is kept for so long after it was last used."""
        self._shelf = Shelf(url)
        self._quota = quota_bytes
        self._keep_seconds = keep_seconds
        # On the same disk, so that what is whole is only renamed.
        beside = self._shelf.folder or platformdirs.user_cache_path("zimage")
        self._gathering = beside / "incoming"
        self._lock = threading.Lock()
        self._incoming: dict[str, Incoming] = {}
        self._sizes: dict[str, int] = {}
        self._looked_at = float("-inf")

    def find(self, sha256: str) -> Found:
        """What is there of a blob."""
        size = self._shelf.size(_key(sha256))
        if size is not None:
            return Found(complete=True, stored_bytes=size)
        parts = self._gathering.glob(f"{sha256}.*")
        return Found(complete=False, stored_bytes=max((p.stat().st_size for p in parts), default=0))

    def open(self, sha256: str) -> BinaryIO:
        """A blob for reading; raises NotFound."""
        key = _key(sha256)
        try:
            file = self._shelf.open(key)
            self._shelf.touch(key)
        except FileNotFoundError:
            raise NotFound(
                f"there is no blob {sha256}", reason="BLOB_NOT_FOUND", fields={"sha256": sha256}
            ) from None
        return file

    def receive(self, sha256: str, size_bytes: int) -> "Incoming":
        """Goes on with a blob that is not there yet, in the place of whoever did so before. Raises
        Overloaded where there is no room."""
        key = _key(sha256)
        if size_bytes < 0:
            raise _invalid("start.size_bytes", size_bytes, "0 or more", "BLOB_SIZE")
        with self._lock:
            if before := self._incoming.pop(sha256, None):
                before.close()
            self._make_room(sha256, size_bytes)
            self._gathering.mkdir(parents=True, exist_ok=True, mode=0o700)
            for other in self._gathering.glob(f"{sha256}.*"):
                if other.name != f"{sha256}.{size_bytes}":  # one of both sizes was a lie
                    other.unlink(missing_ok=True)
            path = self._gathering / f"{sha256}.{size_bytes}"
            incoming = Incoming(path, sha256, size_bytes, lambda: self._arrived(path, key))
            self._incoming[sha256] = incoming
            return incoming

    def point(self, kind: str, name: str, sha256: str) -> None:
        """Lets a name point at a blob, which stays as long as it does; raises NotFound."""
        key = _name_key(kind, name)
        if self._shelf.size(_key(sha256)) is None:
            raise NotFound(f"there is no blob {sha256}", reason="BLOB_NOT_FOUND")
        self._shelf.write(key, json.dumps({"sha256": sha256}).encode())

    def pointed_at(self, kind: str, name: str) -> str:
        """The digest of the blob that a name points at; raises NotFound."""
        data = self._shelf.read(_name_key(kind, name))
        if data is None:
            raise NotFound(f"there is no {kind} {name}", fields={"field": kind, "given": name})
        return str(json.loads(data)["sha256"])

    def names(self, kind: str) -> list[str]:
        """All of a kind."""
        _checked(kind)
        return sorted(
            entry.key.rpartition("/")[2] for entry in self._shelf.entries(f"{_NAMES}/{kind}")
        )

    def forget(self, kind: str, name: str) -> None:
        """Takes a name away; its blob goes when nothing else points at it and it is old."""
        self._shelf.remove(_name_key(kind, name))

    def sweep(self, wanted_bytes: int = 0) -> None:
        """Removes what no name points at and nobody used for long; of what was not used of late as
        much more as is wanted, the oldest first."""
        now = time.time()
        kept = {
            json.loads(self._shelf.read(entry.key) or b"{}").get("sha256")
            for entry in self._shelf.entries(_NAMES)
        }
        entries = sorted(self._shelf.entries(_BLOBS), key=lambda entry: entry.modified)
        self._sizes = {entry.key.rpartition("/")[2]: entry.size_bytes for entry in entries}
        self._looked_at = time.monotonic()
        for entry in entries:
            sha256, age = entry.key.rpartition("/")[2], now - entry.modified
            is_wanted = self._used_bytes + wanted_bytes > self._quota and age > _IN_USE_SECONDS
            if sha256 not in kept and (age > self._keep_seconds or is_wanted):
                self._shelf.remove(entry.key)
                del self._sizes[sha256]
                _log.info("blob %s went, unused for %.0f s", sha256, age)
        for part in self._gathering.glob("*.*"):
            is_under_way = part.name.partition(".")[0] in self._incoming
            if not is_under_way and now - part.stat().st_mtime > self._keep_seconds:
                part.unlink(missing_ok=True)

    @property
    def _used_bytes(self) -> int:
        coming = (one.size_bytes for one in self._incoming.values())
        return sum(self._sizes.values()) + sum(coming)

    def _make_room(self, sha256: str, size_bytes: int) -> None:
        if time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self.sweep()
        if self._used_bytes + size_bytes > self._quota:
            self.sweep(size_bytes)
        if self._used_bytes + size_bytes > self._quota:
            raise Overloaded(
                f"there is no room for a blob of {size_bytes} bytes: {self._used_bytes} of "
                f"{self._quota} are taken",
                reason="STORE_FULL",
                fields={"given": str(size_bytes), "allowed": str(self._quota), "sha256": sha256},
            )

    def _arrived(self, path: Path, key: str) -> None:
        sha256, _, size = path.name.partition(".")
        if path.exists():  # else a call that was thought dead has done it
            self._shelf.take(path, key)
        with self._lock:
            self._incoming.pop(sha256, None)
            self._sizes[sha256] = int(size)


class Incoming:
    """A blob on its way in."""

    def __init__(
        self, path: Path, sha256: str, size_bytes: int, arrived: Callable[[], None]
    ) -> None:
        self._path = path
        self._sha256 = sha256
        self.size_bytes = size_bytes
        self._arrived = arrived
        self._file = open(path, "ab")  # noqa: SIM115 - closed by `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process that shares the folder has it
            self._file.close()
            raise Unavailable(
                f"blob {sha256} comes in elsewhere", reason="BLOB_BUSY", retry_after=1.0
            ) from None

    @property
    def stored_bytes(self) -> int:
        """How many are there."""
        return self._file.tell()

    def add(self, chunk: bytes) -> None:
        """The next bytes."""
        try:
            if self.stored_bytes + len(chunk) > self.size_bytes:
                given = self.stored_bytes + len(chunk)
                raise _invalid("chunk", f"{given} bytes", f"{self.size_bytes}", "BLOB_SIZE")
            self._file.write(chunk)
        except ValueError:  # the file was closed
            what = f"another call puts blob {self._sha256} now"
            raise Unavailable(what, reason="BLOB_BUSY", retry_after=1.0) from None

    def finish(self) -> None:
        """Moves the blob to the shelf; raises InvalidRequest where it is not what was said."""
        if self.stored_bytes < self.size_bytes:
            given = f"the end after {self.stored_bytes} bytes"
            raise _invalid("chunk", given, f"{self.size_bytes} bytes", "BLOB_INCOMPLETE")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        with open(self._path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._sha256:
            self._path.unlink()
            raise _invalid("start.sha256", self._sha256, f"the digest {found}", "BLOB_DIGEST")
        self._arrived()

    def close(self) -> None:
        """What came stays for the next call."""
        self._file.close()


def _key(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise _invalid("sha256", sha256[:100], "64 hexadecimal digits", "DIGEST")
    return f"{_BLOBS}/{sha256[:2]}/{sha256}"


def _name_key(kind: str, name: str) -> str:
    return f"{_NAMES}/{_checked(kind)}/{_checked(name)}"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        allowed = "letters, digits, '.', '_', '-', 128 at most, a letter or digit first"
        raise _invalid("name", name[:200], allowed, "NAME")
    return name


def _invalid(field: str, given: object, allowed: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {given} given, allowed is {allowed}",
        reason=reason,
        fields={"field": field, "given": str(given), "allowed": allowed},
    )
