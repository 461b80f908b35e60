"""Locks on files. The system releases one when the last process that has it ends, however it ends,
so that nothing needs to be cleaned up after a kill."""

import os
from pathlib import Path
from typing import Self


class Lock:
    """A lock that is held until it is released, by this process or one that inherited it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def taken(cls, path: Path, *, shared: bool = False) -> Self | None:
        """The lock, or nothing when somebody else's excludes it."""
        import fcntl  # not on Windows, where there is no embedded stack

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Lets go of it here; who inherited it has it still."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether somebody has the lock."""
    if not path.exists():
        return False
    lock = Lock.taken(path, shared=True)
    if lock is not None:
        lock.release()
    return lock is None
