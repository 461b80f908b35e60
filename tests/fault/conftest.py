"""How often each fault is done, and the table of what came of it."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
_MARKS = "<!-- faults -->", "<!-- end of faults -->"


@dataclass
class Rows:
    """What was done, how often, and the seconds until the client had what it wanted."""

    times: int
    """How often each fault is done."""
    found: dict[str, list[float]] = field(default_factory=dict)

    def enter(self, what: str, seconds: list[float]) -> None:
        """A fault that cost nothing but time."""
        self.found[what] = seconds


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[Rows]:
    found = Rows(request.config.getoption("--times"))
    yield found
    if request.config.getoption("--write-table") and not request.session.testsfailed:
        before, _, rest = _TABLE.read_text().partition(_MARKS[0])
        _, _, after = rest.partition(_MARKS[1])
        lines = [
            "| fault | times | lost | seconds until service, median | longest |",
            "| --- | --- | --- | --- | --- |",
            *(_row(what, took) for what, took in found.found.items()),
        ]
        _TABLE.write_text(before + "\n".join([_MARKS[0], *lines, _MARKS[1]]) + after)


def _row(what: str, took: list[float]) -> str:
    median, longest = statistics.median(took), max(took)
    return f"| {what} | {len(took)} | nothing | {median:.1f} | {longest:.1f} |"
