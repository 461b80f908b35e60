"""What import-linter cannot see: what an import really loads, and who reads the environment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "diffusers")
READS_ENVIRONMENT = {
    "zimage_core/settings.py",
    "client/zimage_client/cli/main.py",
    "encoder_service/__main__.py",
    "dit_service/__main__.py",
}
SOURCES = [
    path
    for room in ("zimage_core", "client", "encoder_service", "dit_service", "demo_model")
    for path in sorted((ROOT / room).rglob("*.py"))
]


@pytest.mark.parametrize(
    "module",
    [
        "zimage_client",
        "zimage_client.cli.main",
        "zimage_core.serving.main",
        "encoder_service.rpc.encode",
        "encoder_service.messages",
        "dit_service.rpc.service",
        "dit_service.messages",
    ],
)
def test_fronts_and_client_load_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def _reads_environment(path: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_only_entry_points_and_settings_read_the_environment() -> None:
    readers = {str(path.relative_to(ROOT)) for path in SOURCES if _reads_environment(path)}
    assert readers <= READS_ENVIRONMENT


@pytest.mark.parametrize("room", ["zimage_core", "encoder_service", "dit_service"])
def test_package_files_of_services_and_core_are_empty(room: str) -> None:
    for path in (ROOT / room).rglob("__init__.py"):
        assert path.read_text() == "", path
