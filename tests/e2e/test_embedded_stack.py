"""The embedded stack with the real services: what works without any configuration."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

PATIENCE_SECONDS = 40.0
CLIENT = [sys.executable, "-m", "zimage_client.cli.main"]
HOLDS_A_STACK = """
import asyncio, sys
from zimage_client._embedded import embedded_stack

async def main():
    async with embedded_stack(lambda line: None):
        print("serving", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the random model belongs, in the folders of a user who has nothing yet."""
    with tempfile.TemporaryDirectory(prefix="zi-") as name:  # short, for the sockets in it
        home = Path(name)
        (home / "run").mkdir(mode=0o700)
        (home / "cache/zimage").mkdir(parents=True)
        monkeypatch.chdir(home)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield home / "cache/zimage" / f"random-model-{version('zimage-grpc')}"


def stacks() -> list[Path]:
    """What stacks have left in the runtime folder."""
    return list(Path("run/zimage").glob("stack-*"))


def test_a_picture_without_any_configuration(cache: Path, model_folder: Path) -> None:
    cache.symlink_to(model_folder)
    command = [*CLIENT, "generate", "a red circle", "-o", "out.png", "--seed", "5", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out.png  seed 5  ")
    assert "random model whose pictures are noise" in done.stderr
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert stacks() == []


def test_no_child_outlives_a_killed_client(cache: Path, model_folder: Path) -> None:
    cache.symlink_to(model_folder)
    command = [sys.executable, "-c", HOLDS_A_STACK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 4  # two fronts, two workers
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_SECONDS)
    assert alive == []


def test_a_service_that_cannot_start_says_why(cache: Path) -> None:
    cache.mkdir()
    (cache / "model_index.json").write_text("{}")
    command = [*CLIENT, "generate", "x", "-o", "out.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ended with exit code 1 while it started; its last words:" in done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = stacks()
    assert f"the logs of the embedded services are in {os.path.realpath(folder)}" in done.stderr
    assert (folder / "encoder_service.log").read_text() in done.stderr.replace("\n  ", "\n")
    assert not Path("out.png").exists()
