"""The embedded stack with the real services: what works without any configuration."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.e2e.terminal import CLIENT, Terminal
from zimage_client._embedded import warm
from zimage_client._embedded.stack import brief_stack
from zimage_core.errors import InternalError
from zimage_core.files import write_whole

PATIENCE_SECONDS = 40.0
HOLDS_A_STACK = """
import asyncio, sys
from zimage_client._embedded.stack import brief_stack

async def main():
    async with brief_stack(lambda line: None):
        print("serving", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folders of a user who has nothing yet."""
    with tempfile.TemporaryDirectory(prefix="zi-") as name:  # short, for the sockets in it
        home = Path(name)
        (home / "run").mkdir(mode=0o700)
        monkeypatch.chdir(home)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
        yield home
        for stack in warm.running_stacks():  # of a test that failed
            for process in _processes(stack):
                process.kill()


def stacks() -> list[Path]:
    """What stacks have left in the runtime folder."""
    return list(Path("run/zimage").glob("stack-*"))


def test_a_picture_without_any_configuration(home: Path) -> None:
    command = [*CLIENT, "generate", "a red circle", "-o", "out.png", "--seed", "5", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out.png  seed 5  ")
    assert "embedded demo model" in done.stderr
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert stacks() == []


def test_neither_the_folder_nor_the_environment_meddles(home: Path) -> None:
    Path("queue.py").write_text("raise SystemExit('hijacked')")
    environment = {**os.environ, "ZIMAGE_PROFILE": "work", "ZIMAGE_DIT__MAX_SIDE_PX": "32"}
    settings = Path("settings.toml")
    settings.write_text("[work.client]\n")
    command = [*CLIENT, "generate", "x", "-o", "out.png", "--config", str(settings), "--steps", "1"]
    command[1:1] = ["-P"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_no_child_outlives_a_killed_client(home: Path) -> None:
    command = [sys.executable, "-c", HOLDS_A_STACK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 4  # two fronts, two workers
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_SECONDS)
    assert alive == []


async def test_a_service_that_cannot_start_says_why(home: Path) -> None:
    (home / "model_index.json").write_text("{}")
    with pytest.raises(InternalError, match="ended with exit code 1 while it started") as caught:
        async with brief_stack(lambda _line: None, model=home):
            pass
    (folder,) = stacks()
    [note] = caught.value.__notes__
    assert note == f"the logs of the embedded services are in {home / folder}"
    said = (folder / "encoder_service.log").read_text().rstrip()
    assert "Traceback" not in said
    assert said in str(caught.value).replace("\n  ", "\n")


def _alive() -> list[warm.WarmStack]:
    return warm.running_stacks()


def _processes(stack: warm.WarmStack) -> list[psutil.Process]:
    """The stack's keeper, fronts and workers."""
    every = psutil.process_iter(["cmdline"])
    own = [one for one in every if str(stack.folder) in " ".join(one.info["cmdline"] or [])]
    return [*own, *(child for one in own for child in one.children())]


def _command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*CLIENT, *arguments], capture_output=True, text=True, check=False)


def test_two_first_callers_at_terminals_share_a_stack(home: Path) -> None:
    terminals = [
        Terminal(
            "generate", "a red circle", "-o", f"{name}.png", "--seed", "5", "--steps", "2", "--solo"
        )
        for name in ("one", "other")
    ]
    for terminal in terminals:
        assert terminal.end() == 0, terminal.shown
        terminal.close()
    assert "another command starts" in "".join(terminal.shown for terminal in terminals)
    assert Path("one.png").read_bytes() == Path("other.png").read_bytes()
    [stack] = _alive()
    assert stack.folder.stat().st_mode & 0o077 == 0
    assert not stack.stays
    processes = _processes(stack)
    assert len(processes) >= 5  # a keeper, two fronts, two workers
    info = _command("info")
    assert info.returncode == 0, info.stderr
    assert f"logs        {stack.folder}" in info.stdout
    again = _command("generate", "a red circle", "-o", "third.png", "--seed", "5", "--steps", "2")
    assert again.returncode == 0
    # Nobody's patience lasts ten minutes: the keeper reads its record anew all the time.
    write_whole(
        stack.folder / "stack.json",
        json.dumps({"model": str(stack.model), "idle_seconds": 1}).encode(),
    )
    _, left = psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
    assert left == []
    assert _alive() == []
    assert _command("info").returncode == 4


def test_a_stack_that_is_up_serves_its_model_until_down(home: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, "mine")
    up = _command("up", "--model", "mine", "--json")
    assert up.returncode == 0, up.stderr
    line = json.loads(up.stdout)
    [stack] = _alive()
    assert (line["logs"], stack.stays) == (str(stack.folder), True)
    made = _command("generate", "x", "-o", "x.png")
    assert made.returncode == 0
    assert "demo model" not in made.stderr
    assert _command("encode", "x", "-o", "x.safetensors").returncode == 0

    processes = _processes(stack)
    [keeper] = [one for one in processes if "keeper" in " ".join(one.cmdline())]
    keeper.kill()
    assert _command("up", "--model", "mine").returncode == 0  # while the services still end
    _, left = psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
    assert left == []

    for process in _processes(stack):
        with suppress(psutil.NoSuchProcess):  # it ended with one that it belongs to
            process.kill()
    psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
    lost = _command("generate", "x", "-o", "y.png")
    assert lost.returncode == 3  # and not a picture by another model
    assert "has ended by itself" in lost.stderr
    assert _command("up", "--model", "mine").returncode == 0

    os.utime("mine/model_index.json", (1, 1))
    stale = _command("generate", "x", "-o", "y.png")
    assert stale.returncode == 3
    assert (
        "before the files there were changed; start it anew with zimage-client up" in stale.stderr
    )
    down = _command("down", "--json")
    assert json.loads(down.stdout)["model"] == str(Path("mine").resolve())
    assert _alive() == []
    assert "no embedded stack runs" in _command("down").stderr
    nothing_to_see = _command("trace")
    assert nothing_to_see.returncode == 4
    assert "no embedded stack runs" in nothing_to_see.stderr
    (stack.folder / "stack.json").write_text('{"of": "a newer version"}')
    assert _command("info").returncode == 4


def test_a_stack_that_cannot_start_says_why(home: Path) -> None:
    Path("broken").mkdir()
    Path("broken/model_index.json").write_text("{}")
    up = _command("up", "--model", "broken")
    assert up.returncode == 1
    assert "its last words:" in up.stderr
    assert "encoder_service ended with exit code 1" in up.stderr
    assert _alive() == []
    assert _command("up", "--model", "nowhere").returncode == 2
