"""A blob on its way in: a file of this machine that grows until it is whole, over as many calls as
it takes."""

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from zimage_core.errors import InvalidRequest, Unavailable
from zimage_core.store.shelf import on_disk

_RETRY_SECONDS = 1.0


class Incoming:
    """Of one call; any thread may use it. Nobody else writes the file as long as it is open."""

    def __init__(self, path: Path, size_bytes: int, left: Callable[["Incoming"], None]) -> None:
        """Raises Unavailable while another process has the file. `left` hears that it is closed."""
        self._path = path
        self.size_bytes = size_bytes
        self._left = left
        self._lock = threading.Lock()
        with on_disk():
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        try:
            self._take_hold()
        except BaseException:
            self._file.close()
            raise
        self._stored_bytes = self._began_at

    def _take_hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_this = os.fstat(self._file.fileno()).st_ino == self._path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            is_this = False
        if not is_this:  # another process writes it, or has just moved it away
            raise self._busy()
        self._began_at = self._file.seek(0, os.SEEK_END)
        if self._began_at > self.size_bytes:  # one of both sizes was a lie
            self._file.truncate(0)
            self._began_at = 0

    @property
    def stored_bytes(self) -> int:
        """How many are there."""
        return self._stored_bytes

    def add(self, chunk: bytes) -> None:
        """The next bytes."""
        with self._lock:
            self._refuse_if_closed()
            stored = self._stored_bytes + len(chunk)
            if stored > self.size_bytes:
                given = f"{stored} bytes"
                raise InvalidRequest.given("chunk", given, f"{self.size_bytes}", "BLOB_SIZE")
            with on_disk():
                view = memoryview(chunk)
                while view:
                    view = view[self._file.write(view) :]
            self._stored_bytes = stored

    def finish(self, take: Callable[[Path], None]) -> None:
        """Has the file taken away when it is what its name says; raises InvalidRequest when not."""
        with self._lock:
            self._refuse_if_closed()
            if self._stored_bytes < self.size_bytes:
                given = f"the end after {self._stored_bytes} bytes"
                allowed = f"{self.size_bytes} bytes"
                raise InvalidRequest.given("chunk", given, allowed, "BLOB_INCOMPLETE")
            with on_disk():
                os.fsync(self._file.fileno())
                self._file.seek(0)
                found = hashlib.file_digest(self._file, "sha256").hexdigest()
            if found != self._path.name:
                self._path.unlink(missing_ok=True)
                raise self._wrong(found)
            take(self._path)

    def close(self) -> None:
        """What came stays for the next call. Waits for what another thread does with it."""
        with self._lock:
            if not self._file.closed:
                if not self._stored_bytes:  # nothing to go on from
                    self._path.unlink(missing_ok=True)
                self._file.close()
                self._left(self)

    @property
    def is_finishing(self) -> bool:
        """Whether another thread works on it just now, and all bytes are there."""
        return self._lock.locked() and self._stored_bytes == self.size_bytes

    def _wrong(self, found: str) -> InvalidRequest | Unavailable:
        if self._began_at:  # the fault may lie in what others had left
            return Unavailable(
                "what was there of the blob was not of it; send it once more",
                reason="BLOB_DIGEST",
                retry_after=0.0,
            )
        name = self._path.name
        return InvalidRequest.given("start.sha256", name, f"the digest {found}", "BLOB_DIGEST")

    def _refuse_if_closed(self) -> None:
        if self._file.closed:
            raise self._busy()

    def _busy(self) -> Unavailable:
        return Unavailable(
            f"another call puts blob {self._path.name} now",
            reason="BLOB_BUSY",
            retry_after=_RETRY_SECONDS,
        )
