"""Documents say what the code says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"


def test_generated_tables_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs/tables.py"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_every_file_in_the_map_has_a_purpose() -> None:
    rows = re.findall(r"^\| `([\w./]+)` \| (.*) \|$", ARCHITECTURE.read_text(), re.MULTILINE)
    assert rows
    assert [file for file, purpose in rows if not purpose] == []


def test_every_path_that_is_named_exists() -> None:
    named = set(
        re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|proto|txt))`", ARCHITECTURE.read_text())
    )
    rooms = (ROOT, ROOT / "dit_service", ROOT / "encoder_service", ROOT / "zimage_core")
    assert [path for path in named if not any((room / path).exists() for room in rooms)] == []


def test_the_changelog_begins_with_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[?([\w.]+)\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == version


def test_every_fault_was_done_often_and_lost_nothing() -> None:
    table = (ROOT / "docs/reliability.md").read_text().partition("<!-- faults -->")[2]
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \| [\d.]+ \| [\d.]+ \|$", table, re.MULTILINE)
    behind = [
        f"{what} behind {proxy}"
        for what in ("silence", "SIGTERM for the DiT", "SIGKILL for the DiT")
        for proxy in ("nginx", "haproxy", "envoy")
    ]
    for kind in ("kill -9", "SIGSTOP", "disk", "link", "clock", "drained and restarted", *behind):
        assert [what for what, _, _ in rows if kind in what], kind
    assert [row for row in rows if int(row[1]) < 20 or row[2] != "nothing"] == []
