"""Every command and program of the README, read from it and run."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from zimage_client import read_receipt

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
NOT_RUN = {"make test"}  # this test is part of it


def _environment(folder: Path) -> dict[str, str]:
    """A user's, on a machine where nothing of ours ever ran."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "ZIMAGE_", "XDG_", "MFLAGS", "PYTEST"))
    }
    scripts = Path(sys.executable).parent
    return {
        **kept,
        "PATH": f"{scripts}:{kept['PATH']}",
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XDG_CONFIG_HOME": str(folder / "config"),
    }


def _run(script: str, folder: Path) -> None:
    result = subprocess.run(
        ["bash", "-c", f"set -emuo pipefail\n{script}"],
        cwd=folder,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a user would be: the clone, as far as the commands look at it."""
    with tempfile.TemporaryDirectory(prefix="zi-") as name:  # short, for the sockets in it
        folder = Path(name)
        (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
        (folder / "demo_model").symlink_to(ROOT / "demo_model")
        yield folder
        _run("zimage-client down", folder)  # what a block that broke has left


@pytest.mark.timeout(300)
def test_the_commands_work_as_they_stand(folder: Path) -> None:
    lines: list[str] = []
    for language, text in BLOCKS:
        if language == "bash":
            lines += [line for line in text.splitlines() if line not in NOT_RUN]
        elif language == "python":
            lines += ["python - <<'PROGRAM'", text, "PROGRAM"]
    assert "make run" in lines
    script = "\n".join(lines).replace("make ", f"make -C {ROOT} ")
    _run(script, folder)
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written >= {
        *("circle.png", "stars-0.png", "stars-1.png", "stars-2.png", "heart.webp"),
        *("served.png", "prompt.safetensors", "again.png", "cross.png"),
    }
    pixels = [read_receipt(folder / name).pixels_sha256 for name in ("served.png", "again.png")]
    assert pixels[0] == pixels[1]


@pytest.mark.timeout(120)
def test_the_split_works_with_this_machine_as_all_of_them(folder: Path, model_folder: Path) -> None:
    [transcript] = [text for language, text in BLOCKS if language == "console"]
    commands = [line.split("$", 1)[1].strip() for line in transcript.splitlines()]
    script = "\n".join(f"{command} &" for command in commands[:-1]) + f"\n{commands[-1]}\n"
    for named, here in {
        "mac.local": "127.0.0.1",
        "gpu.local": "127.0.0.1",
        "0.0.0.0": "127.0.0.1",  # noqa: S104 - replaced, not bound
        "50051": str(_free_port()),
        "50052": str(_free_port()),
        "Z-Image-Turbo": str(model_folder),
        " --insecure": ' --insecure --probes ""',
    }.items():
        script = script.replace(named, here)
    _run(script + "kill %1 %2; wait", folder)
    assert (folder / "out.png").is_file()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
