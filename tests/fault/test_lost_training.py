"""E7: whatever dies while a job learns, and whenever: its losses and its adapter are those of a job
that nothing happened to, bit for bit."""

import hashlib
import io
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.relay import Relay, relaying
from tests.e2e.services import free_address
from tests.e2e.trainer import Losses, Shown, at, decisive, lines
from tests.fault.conftest import Rows
from tests.fault.stack import Supervised, supervised
from zimage_client.cli.main import main as command

pytestmark = pytest.mark.timeout(0)

STEPS, INTERVAL = 30, 5
HITS = 5
"""In one job, at moments of chance."""
LONGEST_PAUSE_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
JOB = f"""
batch_size = 2
shuffle_tags = true
[training]
step_count = {STEPS}
seed = 4
average_decay = 0.9
lora = {{ groups = [{{ rank = 2 }}] }}
save = {{ dtype = "float32" }}
"""


@dataclass(frozen=True)
class Stack:
    """One of each, and a relay between the trainer and the DiT service."""

    dit: Supervised
    encoder: Supervised
    relay: Relay


@dataclass(frozen=True)
class Learning:
    """A job, and a trainer of its own: nothing of what that caches was there before."""

    job: str
    trainer: Supervised
    folder: Path

    @property
    def step(self) -> int:
        """How many are behind it."""
        [shown] = _told("jobs", "show", self.job, "--json", *at(self.trainer))
        return int(str(shown["step"]))

    def wait_until(self, step: int) -> None:
        """So many are behind it."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.step < step:
            assert time.monotonic() < until, "it learns nothing"
            time.sleep(0.05)

    def end(self) -> tuple[Losses, str]:
        """What was learnt in all, and the digest of the tensors that came of it."""
        *steps, end = _told("jobs", "watch", self.job, "--json", *at(self.trainer))
        assert end["state"] == "completed"
        file = self.folder / "learnt.safetensors"
        _told("jobs", "export", self.job, "-o", str(file), "--json", *at(self.trainer))
        data = file.read_bytes()
        tensors = data[8 + int.from_bytes(data[:8], "little") :]  # names of metadata have no order
        return decisive(steps), hashlib.sha256(tensors).hexdigest()


def _told(*asked: str) -> list[Shown]:
    out = io.StringIO()
    with redirect_stdout(out):
        assert command(list(asked)) == 0
    return lines(out.getvalue()) if "export" not in asked else []


@pytest.fixture(scope="module")
def stack(model_folder: Path) -> Iterator[Stack]:
    with supervised(model_folder) as ([dit], [encoder]), relaying(dit.address) as relay:
        yield Stack(dit, encoder, relay)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.new("RGB", (128, 128), (60 * number, 90, 200)).save(folder / f"{number}.png")
        tags = ", ".join(f"tag {number}{letter}" for letter in "abcdefg")
        (folder / f"{number}.txt").write_text(tags)  # in another order each time: to be encoded
    return folder


@contextmanager
def _learning(
    stack: Stack, pictures: Path, folder: Path, interval: int = INTERVAL
) -> Iterator[Learning]:
    places = "--store", str(folder / "store"), "--database", f"sqlite:///{folder}/jobs"
    services = "--encoder", stack.encoder.address, "--dit", stack.relay.address
    (folder / "job.toml").write_text(JOB)
    trainer = Supervised("trainer_service", free_address(), *services, *places)
    try:
        trainer.wait_until_serving()
        what = "--config", str(folder / "job.toml"), "--images", str(pictures), "--name", "it"
        often = "--checkpoint-interval", str(interval), "--replace", "--detach", "--json"
        [begun] = _told("train", *what, *often, *at(trainer))
        yield Learning(str(begun["id"]), trainer, folder)
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def expected(
    stack: Stack, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Losses, str]:
    """What is learnt when nothing happens."""
    with _learning(stack, pictures, tmp_path_factory.mktemp("it")) as learning:
        return learning.end()


FAULTS: dict[str, Callable[[Stack, Learning], None]] = {
    "kill -9 of the trainer": lambda _, learning: learning.trainer.hit(signal.SIGKILL),
    "kill -9 of the DiT's front": lambda stack, _: stack.dit.hit(signal.SIGKILL),
    "kill -9 of the DiT's worker": lambda stack, _: stack.dit.hit_worker(signal.SIGKILL),
    "kill -9 of the encoder": lambda stack, _: stack.encoder.hit(signal.SIGKILL),
    "the trainer's connection to the DiT is cut": lambda stack, _: stack.relay.cut(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_changes_no_bit(
    stack: Stack, pictures: Path, expected: tuple[Losses, str], fault: str, tmp_path: Path,
    rows: Rows,
) -> None:  # fmt: skip
    seed = secrets.randbits(32)
    sys.stdout.write(f"moments of seed {seed}\n")
    chance = random.Random(seed)
    took: list[float] = []
    for _ in range(rows.times):
        folder = tmp_path / str(len(took))
        folder.mkdir()
        with _learning(stack, pictures, folder) as learning:
            for hit in range(HITS):
                learning.wait_until((STEPS - INTERVAL) * hit // HITS + 1)
                time.sleep(chance.uniform(0, LONGEST_PAUSE_SECONDS))
                began, step = time.monotonic(), learning.step
                FAULTS[fault](stack, learning)
                learning.wait_until(min(step + 1, STEPS))
                took.append(time.monotonic() - began)
            assert learning.end() == expected
    rows.enter(f"{fault} as it learns; until the next step", took)


def test_a_connection_that_is_cut_costs_no_step(
    stack: Stack, pictures: Path, expected: tuple[Losses, str], tmp_path: Path
) -> None:
    """The DiT service keeps the session: nothing is learnt again, though nothing was kept."""
    with _learning(stack, pictures, tmp_path, interval=1000) as learning:
        for step in (5, 12, 20):
            learning.wait_until(step)
            stack.relay.cut()
        assert learning.end() == expected
    begun = [
        line for line in stack.dit.service.log if f"{learning.job}/" in line and "from step" in line
    ]
    assert len(begun) == 1, begun
