"""Documents say what the code says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE_ROOMS = (
    "zimage_core",
    "client",
    "encoder_service",
    "dit_service",
    "demo_model",
    "bench",
    "protos/zimage_rpc",
)


def test_generated_tables_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs/tables.py"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_the_file_map_names_every_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"^\| `([\w./]+)` \|", text, re.MULTILINE))
    files = {
        str(path.relative_to(ROOT))
        for room in CODE_ROOMS
        for pattern in ("*.py", "*.proto")
        for path in (ROOT / room).rglob(pattern)
        if path.name != "__init__.py" or path.stat().st_size
    }
    assert named == files


def test_the_changelog_begins_with_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[?([\w.]+)\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert [heading for heading in headings if heading != "Unreleased"][0] == version
