"""Two devices that train together learn what one learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.e2e.services import Service, running
from tests.e2e.trainer import Losses, at, begun, learnt, training_with, wait
from zimage_client._embedded.stack import demo_model
from zimage_client.cli.main import main as command

pytestmark = pytest.mark.timeout(300)

TOLERANCE = 1e-5
COMMON = (
    "--batch-size",
    "4",
    "--steps",
    "6",
    "--checkpoint-interval",
    "2",
    "--name",
    "it",
    "--replace",
)


@pytest.fixture(scope="module")
def encoder() -> Iterator[Service]:
    with running("encoder_service", "--model", str(demo_model())) as encoder:
        encoder.wait_until("SERVING")
        yield encoder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        size = (128, 96 + 16 * number)
        Image.new("RGB", size, (60 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a plain picture" + " of something" * number)
    return folder


@contextmanager
def _services(encoder: Service, folder: Path, *more: str) -> Iterator[tuple[Service, Service]]:
    flags = "--model", str(demo_model()), "--encoder", encoder.address, *more
    with running("dit_service", *flags, "--store", str(folder / "store")) as dit:
        dit.wait_until("SERVING")
        with training_with(encoder.address, dit.address, folder) as trainer:
            yield dit, trainer


def _asked(pictures: Path, trainer: Service, *more: str) -> list[str]:
    return ["train", "--images", str(pictures), *COMMON, *more, *at(trainer)]


def _assert_near(found: Losses, expected: Losses) -> None:
    assert len(found) == len(expected)
    for (*step, loss, norm), (*same, other_loss, other_norm) in zip(found, expected, strict=True):
        assert step == same
        assert loss == pytest.approx(other_loss, rel=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=TOLERANCE)


@pytest.mark.parametrize("more", [[], ["--full-training"]], ids=["adapter", "full"])
def test_two_learn_what_one_learns_with_the_whole_batch(
    encoder: Service, pictures: Path, tmp_path: Path, more: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind = ["--full"] if more else []
    with _services(encoder, tmp_path / "one", *more) as (_, trainer):
        expected, _ = learnt(_asked(pictures, trainer, *kind), capsys)
    with _services(encoder, tmp_path / "two", *more, "--train-devices", "2") as (dit, trainer):
        found, _ = learnt(_asked(pictures, trainer, *kind), capsys)
        _assert_near(found, expected)
        small = ["--batch-size", "1", "--steps", "2"]  # there is nothing for the other
        learnt(_asked(pictures, trainer, *kind, *small), capsys)
        if more:
            return
        job_file = tmp_path / "job.toml"
        job_file.write_text('training.optimizer.name = "adamw-8bit"')
        assert command(_asked(pictures, trainer, "--config", str(job_file))) == 1
        assert "adamw_8bit needs CUDA" in capsys.readouterr().out
        job = begun(_asked(pictures, trainer, "--detach"), capsys)
        wait(job, at(trainer), capsys, lambda shown: int(str(shown["step"])) >= 2)
        [other] = psutil.Process(dit.worker.pid).children()
        other.kill()  # nobody goes on alone
        done, _ = learnt(["jobs", "watch", job, *at(trainer)], capsys)
        assert done == found
