"""What the user sees: results on stdout, everything else on stderr, one live line at a terminal."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from zimage_client.cli import inline


class Terminal:
    """Where a command writes. Files and pipes get no live line."""

    def __init__(self, out: TextIO, err: TextIO, way: inline.Way | None = None) -> None:
        """`way` is how it would show pictures, if it is a terminal."""
        self._out = out
        self._err = err
        self._is_live = err.isatty()
        self._way = way if self._is_live else None
        self._live = ""
        self._picture_rows = 0
        """Of the picture right above the live line."""

    @property
    def is_interactive(self) -> bool:
        """Whether somebody sits there who may give another command soon."""
        return self._is_live

    @property
    def width(self) -> int:
        """In letters; of a file or a pipe, the usual."""
        return shutil.get_terminal_size().columns

    @property
    def shows_pictures(self) -> bool:
        """Whether `picture` can be used."""
        return self._way is not None

    def picture(self, png: bytes, size: tuple[int, int]) -> None:
        """A picture above the live line; takes the place of the one that is there."""
        assert self._way is not None
        self.clear()
        if self._picture_rows:
            self._err.write(f"\x1b[{self._picture_rows}A")
        columns, rows = inline.cells(size, shutil.get_terminal_size())
        self._err.write(inline.text(self._way, png, columns, rows))
        self._err.flush()
        self._picture_rows = rows

    def result(self, line: str) -> None:
        """A line that programs may read."""
        self.clear()
        self._picture_rows = 0  # it has moved up
        self._out.write(f"{line}\n")
        self._out.flush()

    def note(self, line: str) -> None:
        """A line for the reader."""
        self.clear()
        self._picture_rows = 0
        self._err.write(f"{line}\n")
        self._err.flush()

    def live(self, line: str) -> None:
        """What goes on now; replaces what went on before."""
        if not self._is_live or line == self._live:
            return
        width = shutil.get_terminal_size().columns - 1
        self._err.write("\r" + line[:width].ljust(width))
        self._err.flush()
        self._live = line

    def clear(self) -> None:
        """Leaves the cursor at the beginning of an empty line."""
        if self._live:
            self._err.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            self._err.flush()
            self._live = ""

    @contextmanager
    def shows_warnings(self) -> Iterator[None]:
        """The SDK's warnings as notes, so that they do not run into the live line."""
        handler = _Notes(self)
        logger = logging.getLogger("zimage_client")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.note(f"warning: {record.getMessage()}")
