"""Full trainings through all three services: a model that draws otherwise in the end."""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.services import Service, running
from tests.e2e.trainer import at, begun, learnt, lines, show, training_with, wait
from zimage_client import Client, Options, Trainer
from zimage_client._embedded.stack import demo_model
from zimage_client.cli.main import main as command

pytestmark = pytest.mark.timeout(300)

PROMPT = "a large red circle in the middle on a blue background"
FULL = sorted((Path(__file__).parents[2] / "examples").glob("full-*.toml"))
WISH = Options(seed=3, steps=4, guidance=0.0)


@dataclass(frozen=True)
class Full:
    encoder: Service
    dit: Service
    folder: Path

    @contextmanager
    def trainer(self) -> Iterator[Service]:
        with training_with(self.encoder.address, self.dit.address, self.folder) as trainer:
            yield trainer


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Full]:
    folder, model = tmp_path_factory.mktemp("full"), ["--model", str(demo_model())]
    with running("encoder_service", *model) as encoder:
        flags = "--encoder", encoder.address, "--store", str(folder / "store"), "--full-training"
        with running("dit_service", *model, *flags) as dit:
            for service in (encoder, dit):
                service.wait_until("SERVING")
            yield Full(encoder, dit, folder)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small full training."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        Image.new("RGB", (128, 128), (250, 80 * number, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a plain orange picture")
    flags = "--full", "--steps", "8", "--checkpoint-interval", "3", "--learning-rate", "0.001"
    return ["train", "--images", str(folder), *flags, "--name", "orange", "--isolated"]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_model_learns_and_is_loaded_as_a_model(
    full: Full, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, exact = tmp_path / "samples", tmp_path / "job.toml"
    exact.write_text('[training.save]\ndtype = "float32"')
    with full.trainer() as trainer:
        flags = "--trainer", trainer.address, "--sample", PROMPT, "--samples", str(samples)
        with Client(full.dit.address) as client:
            before = client.generate(PROMPT, **WISH).pictures[0]
            keep = "--keep", "2", "--config", str(exact)
            assert command([*asked, *flags, *keep, "--json"]) == 0
            after = client.generate(PROMPT, **WISH).pictures[0]
            [job] = [one for one in lines(capsys.readouterr().out) if "checkpoints" in one]
            assert job["checkpoints"] == [6, 8]
            assert len({_digest(file) for file in samples.iterdir()}) == 3

            first, _ = learnt([*asked, "--trainer", trainer.address], capsys)
            again, _ = learnt([*asked, "--trainer", trainer.address], capsys)
            assert first == again  # each begins with the model as it was

            file = tmp_path / "orange.safetensors"
            export = ["jobs", "export", str(job["id"]), "-o", str(file), *at(trainer)]
            assert command(export) == 0
        assert before.pixels_sha256 != after.pixels_sha256

        capsys.readouterr()
        adapter = [one for one in asked if one != "--full"]
        other = begun([*adapter, "--trainer", trainer.address, "--detach"], capsys)
        with Trainer(trainer.address) as client:
            spec = client.get(other).spec
            spec.name = "another"
            forecast = client.plan(spec)
        assert forecast.needs is None
        assert "learns the model itself, in full, alone" in forecast.waits_for
        waiting = wait(other, at(trainer), capsys, lambda shown: bool(shown["waits_for"]))
        assert "learns the model itself, in full, alone" in str(waiting["waits_for"])
        assert command(["jobs", "cancel", other, *at(trainer)]) == 0

    folder = tmp_path / "model"
    shutil.copytree(demo_model(), folder)
    [weights] = (folder / "transformer").glob("*.safetensors")
    shutil.copy(file, weights)
    with running("dit_service", "--model", str(folder), "--encoder", full.encoder.address) as dit:
        dit.wait_until("SERVING")
        with Client(dit.address) as client:
            loaded = client.generate(PROMPT, **WISH).pictures[0]
    assert loaded.pixels_sha256 == after.pixels_sha256


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_an_example_runs(
    full: Full, asked: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--side", "64", "--steps", "2", "--config", str(path)
    with full.trainer() as trainer:
        losses, _ = learnt([*asked, *small, "--trainer", trainer.address], capsys)
    assert len(losses) == 2


@pytest.mark.parametrize("who", ["trainer", "worker"])
def test_what_dies_on_the_way_changes_no_loss(
    full: Full, asked: list[str], who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "--steps", "12", "--checkpoint-interval", "4"
    with full.trainer() as trainer:
        expected, _ = learnt([*asked, *steps, "--trainer", trainer.address], capsys)
        job = begun([*asked, *steps, "--trainer", trainer.address, "--detach"], capsys)
        wait(job, at(trainer), capsys, lambda shown: int(str(shown["step"])) >= 6)
        if who == "trainer":
            trainer.process.send_signal(signal.SIGKILL)
            trainer.wait_for_exit()
        else:
            full.dit.worker.kill()
            assert command(["jobs", "watch", job, "--json", *at(trainer)]) == 0
    with full.trainer() as trainer:
        capsys.readouterr()
        assert command(["jobs", "watch", job, "--json", *at(trainer)]) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found = [(one["step"], one["loss"], one["gradient_norm"]) for one in told if "loss" in one]
        assert found == expected
        assert show(job, at(trainer), capsys)["state"] == "completed"
