"""The command line as people have it: in the foreground of a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

from tests.e2e.services import PATIENCE_SECONDS

CLIENT = (sys.executable, "-m", "zimage_client.cli.main")

_CTRL_C = b"\x03"
_TAKES_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""In a process of its own: between fork and exec, gRPC's own threads, which this process has, may
be waited for in vain."""


class Terminal:
    """A command in the foreground of a terminal of its own; `inside` is a command that runs it."""

    def __init__(self, *arguments: str, inside: Sequence[str] = ()) -> None:
        self._ours, self._theirs = pty.openpty()
        self.settings = termios.tcgetattr(self._theirs)
        self.shown = ""

        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKES_TERMINAL, *inside, *CLIENT, *arguments],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
        )

    def wait_for(self, pattern: str) -> "re.Match[str]":
        """What is shown, as soon as it matches."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < until, self.shown
            self._read(0.1)
        return found

    def interrupt(self) -> None:
        """Presses Ctrl-C."""
        os.write(self._ours, _CTRL_C)

    def end(self) -> int:
        """Reads to the end; returns the exit code."""
        while self.process.poll() is None:
            self._read(0.1)
        self._read(0.1)
        assert termios.tcgetattr(self._theirs) == self.settings
        return self.process.returncode

    def close(self) -> None:
        """Ends what is left."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def _read(self, seconds: float) -> None:
        if select.select([self._ours], [], [], seconds)[0]:
            self.shown += os.read(self._ours, 1 << 16).decode()
