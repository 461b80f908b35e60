"""Ctrl-C as people press it: a real one, at a terminal, in every phase of generate."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.services import Service, running
from tests.e2e.terminal import Terminal


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Iterator[Service]:
    with running("encoder_service", "--model", str(model_folder)) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(model_folder: Path, encoder: Service) -> Iterator[Service]:
    with running("dit_service", "--model", str(model_folder), "--encoder", encoder.address) as it:
        it.wait_until("SERVING")
        yield it


@contextmanager
def _generating(dit: Service, folder: Path, *flags: str) -> Iterator[Terminal]:
    where = ["--server", dit.address, "-o", str(folder / "out.png")]
    terminal = Terminal("generate", "x", "--seed", "1", *where, *flags)
    try:
        yield terminal
    finally:
        terminal.close()


def _ended(terminal: Terminal, folder: Path) -> None:
    """Interrupted, with a terminal as it was and nothing left behind."""
    assert terminal.end() == 130
    last = terminal.shown.rsplit("\r", 2)[-2:]
    assert last == ["interrupted", "\n"], terminal.shown[-200:]
    assert list(folder.iterdir()) == []


def _forwards(dit: Service, size: str) -> int:
    """What the worker ran for the request, which it says when it is done with it."""
    line = json.loads(dit.wait_for_line(f"of {size}"))["message"]
    found = re.search(r"(\d+) forwards", line)
    assert found is not None
    return int(found[1])


def test_while_the_prompt_is_encoded(dit: Service, encoder: Service, tmp_path: Path) -> None:
    worker = encoder.worker
    worker.suspend()
    with _generating(dit, tmp_path, "--width", "48") as terminal:
        terminal.wait_for("encoding")
        terminal.interrupt()
        _ended(terminal, tmp_path)
    dit.wait_for_line("Generate CANCELLED")
    worker.resume()
    assert not any("of 48x" in line for line in dit.log)


def test_while_it_is_denoised(dit: Service, tmp_path: Path) -> None:
    flags = ("--width", "512", "--height", "528", "--steps", "900")
    with _generating(dit, tmp_path, *flags) as terminal:
        terminal.wait_for("step 3/900")
        terminal.interrupt()
        _ended(terminal, tmp_path)
    steps = [int(step) for step in re.findall(r"step (\d+)/900", terminal.shown)]
    # The step under way when it was told, and two more.
    assert _forwards(dit, "512x528") <= max(steps) + 1 + 2


def test_while_it_is_decoded(dit: Service, tmp_path: Path) -> None:
    flags = ("--width", "1024", "--height", "1008", "--steps", "1", "--count", "4")
    with _generating(dit, tmp_path, *flags) as terminal:
        terminal.wait_for("decoding")
        terminal.interrupt()
        _ended(terminal, tmp_path)
    assert _forwards(dit, "1024x1008") <= 3


def test_while_it_waits_for_a_service(tmp_path: Path) -> None:
    command = ["generate", "x", "--server", "unix:/nowhere", "-o", str(tmp_path / "out.png")]
    terminal = Terminal(*command)
    try:
        terminal.wait_for("cannot be reached")
        terminal.interrupt()
        _ended(terminal, tmp_path)
    finally:
        terminal.close()
