"""How often each fault is done, and the table of what came of it."""

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
            rows = _written()
            at = next((n for n, old in enumerate(rows) if old.startswith(f"| {what} |")), len(rows))
            _write([*rows[:at], row, *rows[at + 1 :]])


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Rows:
    option = request.config.getoption
    if option("--write-table") == "anew":
        _write([])
    return Rows(option("--times"), is_written=option("--write-table") is not None)


def _written() -> list[str]:
    table = _TABLE.read_text().partition(_MARKS[0])[2].partition(_MARKS[1])[0]
    return table.splitlines()[len(_HEAD) :]


def _write(rows: list[str]) -> None:
    before, _, rest = _TABLE.read_text().partition(_MARKS[0])
    lines = "".join(f"{line}\n" for line in (*_HEAD, *rows))
    _TABLE.write_text(before + _MARKS[0] + lines + _MARKS[1] + rest.partition(_MARKS[1])[2])
