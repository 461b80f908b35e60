"""How often each fault is done, and the table of what came of it."""

import fcntl
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest

_TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
_MARKS = "<!-- faults -->\n", "<!-- end of faults -->"
_HEAD = [
    "| fault | times | lost | seconds until service, median | longest |",
    "| --- | --- | --- | --- | --- |",
]


@dataclass(frozen=True)
class Rows:
    """What was done, how often, and the seconds until the client had what it wanted."""

    times: int
    """How often each fault is done."""
    is_written: bool

    def enter(self, what: str, took: list[float]) -> None:
        """A fault that cost nothing but time. Its row takes the place of an older one."""
        median, longest = statistics.median(took), max(took)
        row = f"| {what} | {len(took)} | nothing | {median:.1f} | {longest:.1f} |"
        if self.is_written:
            with open(__file__) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # others may enter theirs at the same time
                rows = [old for old in _written() if not old.startswith(f"| {what} |")]
                _write(sorted([*rows, row]))


def pytest_configure(config: pytest.Config) -> None:
    is_first = not hasattr(config, "workerinput")  # and none of those that do the tests for it
    if is_first and config.getoption("--write-table") == "anew":
        _write([])


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Rows:
    option = request.config.getoption
    return Rows(option("--times"), is_written=option("--write-table") is not None)


def _written() -> list[str]:
    table = _TABLE.read_text().partition(_MARKS[0])[2].partition(_MARKS[1])[0]
    return table.splitlines()[len(_HEAD) :]


def _write(rows: list[str]) -> None:
    before, _, rest = _TABLE.read_text().partition(_MARKS[0])
    lines = "".join(f"{line}\n" for line in (*_HEAD, *rows))
    _TABLE.write_text(before + _MARKS[0] + lines + _MARKS[1] + rest.partition(_MARKS[1])[2])
