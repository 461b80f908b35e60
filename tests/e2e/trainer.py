"""Three services that train, and what tests ask of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.services import PATIENCE_SECONDS, Service, running
from zimage_client._embedded.stack import demo_model
from zimage_client.cli.main import main as command

Shown = dict[str, object]
Losses = list[tuple[object, ...]]


@dataclass(frozen=True)
class Services:
    encoder: Service
    dit: Service
    trainer: Service
    folder: Path
    """What they keep."""

    @property
    def at(self) -> list[str]:
        """The flags of clients of the trainer."""
        return at(self.trainer)


@contextmanager
def three_services(folder: Path) -> Iterator[Services]:
    """With all that they keep in a folder."""
    model = "--model", str(demo_model())
    with running("encoder_service", *model) as encoder:
        flags = "--encoder", encoder.address, "--store", str(folder / "dit")
        with (
            running("dit_service", *model, *flags) as dit,
            training_with(encoder.address, dit.address, folder) as trainer,
        ):
            for service in (encoder, dit):
                service.wait_until("SERVING")
            yield Services(encoder, dit, trainer, folder)


@contextmanager
def training_with(
    encoder: str, dit: str, folder: Path, more: Sequence[str] = ()
) -> Iterator[Service]:
    """A trainer with a store and a database of its own."""
    places = "--store", str(folder / "trainer"), "--database", f"sqlite:///{folder}/jobs"
    flags = "--encoder", encoder, "--dit", dit, *places, *more
    with running("trainer_service", *flags) as trainer:
        trainer.wait_until("SERVING")
        yield trainer


def at(trainer: Service) -> list[str]:
    """The flags of clients of a trainer."""
    return ["--trainer", trainer.address, "--isolated"]


def lines(out: str) -> list[Shown]:
    """What --json tells."""
    return [json.loads(line) for line in out.splitlines()]


def show(job: str, where: list[str], capsys: pytest.CaptureFixture[str]) -> Shown:
    """A job as it is."""
    capsys.readouterr()
    assert command(["jobs", "show", job, "--json", *where]) == 0
    [shown] = lines(capsys.readouterr().out)
    return shown


def wait(
    job: str, where: list[str], capsys: pytest.CaptureFixture[str], what: Callable[[Shown], bool]
) -> Shown:
    """A job once it is so."""
    until = time.monotonic() + 2 * PATIENCE_SECONDS
    while not what(shown := show(job, where, capsys)):
        assert time.monotonic() < until, shown
        time.sleep(0.05)
    return shown


def decisive(steps: list[Shown]) -> Losses:
    """Of what was learnt, all that must be the same again."""
    return [(one["step"], one["loss"], one["gradient_norm"]) for one in steps]


def begun(asked: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The job of a command that does not watch it."""
    capsys.readouterr()
    assert command(asked) == 0
    return capsys.readouterr().out.strip()


def learnt(asked: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Losses, Shown]:
    """What a command that watches tells, and the job in the end."""
    capsys.readouterr()
    code = command([*asked, "--json"])
    *steps, job = lines(capsys.readouterr().out)
    assert code == 0, job
    assert job["state"] == "completed"
    return decisive(steps), job
