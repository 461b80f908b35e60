"""What trainings learn from: files of jobs, masks, crops, and what is kept of all that."""

import hashlib
import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from PIL import Image, ImageDraw

from tests.e2e.services import Service
from tests.e2e.trainer import (
    Services,
    at,
    begun,
    decisive,
    learnt,
    lines,
    show,
    three_services,
    training_with,
    wait,
)
from zimage_client import Client, Trainer, TrainSamples
from zimage_client.cli.main import main as command
from zimage_rpc.dit.v1 import training_pb2

pytestmark = pytest.mark.timeout(300)

LORAS = sorted((Path(__file__).parents[2] / "examples").glob("lora-*.toml"))
JOB = """
name = "glorp"
batch_size = 2
sides_px = [96, 64]
caption_dropout = 0.2
shuffle_tags = true
fixed_tag_count = 1
[training]
seed = 11
step_count = 8
lora = { groups = [{ rank = 2 }] }
[data]
trigger = "glorp,"
[[data.folders]]
path = "new"
masks = "masks"
repeats = 2
flips = true
[[data.folders]]
path = "known"
regularisation = true
weight = 0.5
"""


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with three_services(tmp_path_factory.mktemp("trainer")) as three:
        yield three


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, with its pictures beside it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "masks").mkdir()
    (folder / "new").mkdir()
    (folder / "known").mkdir()
    captions = []
    for number, size in enumerate([(128, 128), (160, 96), (96, 160)]):
        image = Image.new("RGB", size, (60 * number, 90, 200))
        mask = Image.new("RGB", size)
        for one, colour in ((image, "white"), (mask, "white")):
            ImageDraw.Draw(one).rectangle((20, 20, size[0] // 2, size[1] - 20), fill=colour)
        image.save(folder / f"new/{number}.png")
        mask.save(folder / f"masks/{number}.png")
        (folder / f"new/{number}.txt").write_text(f"a white bar, number {number}, plain")
        Image.new("RGB", size, (200, 60 * number, 20)).save(folder / f"known/{number}.webp")
        captions.append({"file_name": f"{number}.webp", "text": "a plain background"})
    (folder / "known/metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    (folder / "job.toml").write_text(JOB)
    return folder / "job.toml"


def test_captions_that_come_late_or_first_change_no_loss(
    services: Services, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", "--replace", "--config", str(job)]
    expected, done = learnt([*asked, *services.at], capsys)
    assert (done["name"], len(expected)) == ("glorp", 8)
    with (
        _late(services.encoder.address) as encoder,
        training_with(encoder, services.dit.address, tmp_path / "late") as late,
    ):
        assert learnt([*asked, *at(late)], capsys)[0] == expected
    with training_with(services.encoder.address, services.dit.address, tmp_path / "first") as first:
        capsys.readouterr()
        assert command([*asked, "--captions", "all-first", "--json", *at(first)]) == 0
        told = lines(capsys.readouterr().out)
        encoded = [line for line in told if "encoded" in line]
        assert told[: len(encoded)] == encoded
        assert encoded[-1]["encoded"] == encoded[-1]["of"]
        assert decisive(told[len(encoded) : -1]) == expected
        narrow, _ = learnt([*asked, "--narrow-captions", *at(first)], capsys)
        apart = [abs(one[1] / other[1] - 1) for one, other in zip(narrow, expected, strict=True)]
        assert 0 < max(apart) < 0.1


@contextmanager
def _late(encoder: str) -> Iterator[str]:
    """The address of an encoder whose answers come after a while of chance, out of their order."""

    def late(_method: str, answers: Iterator[bytes]) -> Iterator[bytes]:
        time.sleep(random.uniform(0, 0.3))
        yield from answers

    with _behind(encoder, late) as address:
        yield address


@contextmanager
def _behind(
    service: str, heard: Callable[[str, Iterator[bytes]], Iterator[bytes]]
) -> Iterator[str]:
    """The address of somebody who tells what a service answers, by its methods, in another way."""
    with grpc.insecure_channel(
        service, options=[("grpc.max_receive_message_length", -1)]
    ) as channel:

        class Between(grpc.GenericRpcHandler):
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
                def answer(requests: Iterator[bytes], context: object) -> Iterator[bytes]:
                    call = channel.stream_stream(details.method)
                    answers = call(requests, metadata=details.invocation_metadata)
                    yield from heard(details.method, answers)

                return grpc.stream_stream_rpc_method_handler(answer)

        server = grpc.server(ThreadPoolExecutor(8), handlers=[Between()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_a_job_rests_while_the_battery_is_low(
    services: Services, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    percents = iter([60.0, 19.4])

    def on_battery(method: str, answers: Iterator[bytes]) -> Iterator[bytes]:
        for answer in answers:
            if not method.endswith("/TrainSession"):
                yield answer
                continue
            told = training_pb2.TrainSessionResponse.FromString(answer)
            if told.HasField("step"):
                told.step.battery_percent = next(percents, 20.0)
            yield told.SerializeToString()

    asked = ["train", "--replace", "--config", str(job), "--low-ram", "-B", "20"]
    expected, _ = learnt([*asked, *services.at], capsys)
    with (
        _behind(services.dit.address, on_battery) as dit,
        training_with(services.encoder.address, dit, tmp_path) as trainer,
    ):
        name = begun([*asked, "--detach", *at(trainer)], capsys)
        rests = wait(name, at(trainer), capsys, lambda shown: shown["state"] == "paused")
        assert rests["waits_for"] == ("the battery where it learns is at 19 %, and 20 is the least")
        assert rests["checkpoints"][-1] == rests["step"] < len(expected)  # type: ignore[index,operator]
        assert command(["jobs", "resume", name, *at(trainer)]) == 0
        wait(name, at(trainer), capsys, lambda shown: shown["state"] == "completed")
        capsys.readouterr()
        assert command(["jobs", "logs", name, "--json", *at(trainer)]) == 0
        assert decisive(lines(capsys.readouterr().out)) == expected


def test_what_is_kept_is_not_made_again_unless_it_is_torn(
    services: Services, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(job)]
    with training_with(services.encoder.address, services.dit.address, tmp_path) as trainer:
        where = at(trainer)
        assert command(["cache", "build", *config, *where]) == 0
        stats = _stats(where, capsys)
        made = _encoded(services.dit)
        assert stats["captions"] >= 5
        assert stats["pictures"] == 9  # six of them have masks or none
        expected, done = learnt(["train", "--replace", *config, *where], capsys)
        assert _encoded(services.dit) == made
        assert _stats(where, capsys) == stats

        latents = tmp_path / "trainer/names/latents"
        torn = sorted(latents.iterdir())[0]
        sha256 = json.loads(torn.read_text())["sha256"]
        blob = tmp_path / f"trainer/blobs/{sha256[:2]}/{sha256}"
        blob.write_bytes(blob.read_bytes()[:-8] + b"\1" * 8)
        assert command(["cache", "verify", *where]) == 1
        assert f"latents/{torn.name}" in capsys.readouterr().out
        assert _stats(where, capsys)["latents"] == stats["latents"] - 1
        assert learnt(["train", "--replace", *config, *where], capsys)[0] == expected
        assert command(["cache", "verify", *where]) == 0

        assert command(["cache", "prune", "--most-gb", "0.0001", *where]) == 0
        left = _stats(where, capsys)
        assert 0 < left["captions"] + left["latents"] < stats["captions"] + stats["latents"]
        assert command(["cache", "prune", "--most-gb", "nan", *where]) == 2
        _forget_all(str(done["id"]), where, capsys)


def _forget_all(job: str, where: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs go, and with them what nobody else needs."""
    assert command(["jobs", "delete", job, *where]) == 0
    assert command(["jobs", "show", job, *where]) == 3
    assert command(["cache", "prune", "--unused-days", "0", *where]) == 0
    left = _stats(where, capsys)
    assert (left["captions"], left["latents"]) == (0, 0)
    assert left["pictures"] == 9  # of the other jobs
    assert command(["jobs", "list", "--json", *where]) == 0
    for other in lines(capsys.readouterr().out):
        assert command(["jobs", "delete", str(other["id"]), *where]) == 0
    assert command(["cache", "prune", *where]) == 0
    assert _stats(where, capsys)["pictures"] == 0


def test_a_job_that_goes_on_is_not_taken_away(
    services: Services, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "train",
        "--replace",
        "--config",
        str(job),
        "--steps",
        "100000",
        "--detach",
        *services.at,
    ]
    assert command(asked) == 0
    name = capsys.readouterr().out.strip()
    assert command(["jobs", "delete", name, *services.at]) == 3
    assert "cancel it first" in capsys.readouterr().err
    waiting = [*asked, "--name", "behind"]
    assert command(waiting) == 0
    behind = capsys.readouterr().out.strip()
    for action in ("cancel", "delete"):
        assert command(["jobs", action, behind, *services.at]) == 0
    assert command(["jobs", "cancel", name, *services.at]) == 0
    assert show(name, services.at, capsys)["state"] == "cancelled"
    assert command(["jobs", "delete", name, *services.at]) == 0
    # The trainer goes on behind one that was taken out of its line.
    after = ["train", "--replace", "--config", str(job), "--steps", "1", *services.at]
    assert len(learnt(after, capsys)[0]) == 1


def test_a_job_waits_for_the_model_that_it_learns_on(
    services: Services, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text('base_model = "another (base)"')
    images = "--images", str(job.parent / "known")
    asked = ["train", "--replace", "--config", str(other), *images, "--detach", *services.at]
    assert command(asked) == 0
    name = capsys.readouterr().out.strip()
    waiting = wait(name, services.at, capsys, lambda shown: bool(shown["waits_for"]))
    assert "has zimage-demo (turbo), and the job learns on another (base)" in str(
        waiting["waits_for"]
    )
    assert command(["jobs", "cancel", name, *services.at]) == 0


def test_a_mask_is_learnt_through(
    services: Services, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [
        "train",
        "--replace",
        "--images",
        str(job.parent / "new"),
        "--side",
        "96",
        "--steps",
        "2",
    ]
    masks = "--masks", str(job.parent / "masks")
    whole, _ = learnt([*plain, *services.at], capsys)
    masked, _ = learnt([*plain, *masks, *services.at], capsys)
    assert all(one != other for one, other in zip(whole, masked, strict=True))


def test_a_batch_can_be_as_large_as_there_is_room_for(
    services: Services, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = "--images", str(job.parent / "new"), "--side", "64", "--name", "roomy", "--replace"
    asked = ["train", *images, "--batch-size", "auto", "--json", *services.at]
    assert command([*asked, "--steps", "1", "--captions", "all-first"]) == 3
    assert "spec.batch_size: 0 given" in capsys.readouterr().out
    losses, done = learnt([*asked, "--steps", "1"], capsys)
    assert len(losses) == 1
    with Trainer(services.trainer.address) as trainer:
        spec = trainer.get(str(done["id"])).spec
    assert (spec.batch_size, spec.training.samples_at_once) == (3, 64)  # of so few and small ones


def test_pictures_that_a_break_took_are_drawn(
    services: Services, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = "--images", str(job.parent / "new"), "--side", "64", "--steps", "1", "--replace"
    with training_with(services.encoder.address, services.dit.address, tmp_path) as trainer:
        name = begun(["train", *images, "--sample", "a bar", "--detach", *at(trainer)], capsys)
        wait(name, at(trainer), capsys, lambda shown: shown["state"] == "completed")
    with sqlite3.connect(tmp_path / "jobs") as database:  # as it is before they are drawn
        for change in (
            "DELETE FROM samples",
            "DELETE FROM events WHERE kind = 'drawn'",
            "UPDATE jobs SET state = 'running'",
        ):
            database.execute(change)
    with training_with(services.encoder.address, services.dit.address, tmp_path) as trainer:
        wait(name, at(trainer), capsys, lambda shown: shown["state"] == "completed")
        with Trainer(trainer.address) as client:
            told = list(client.watch(name, only_past=True))
    [drawn] = [one for one in told if isinstance(one, TrainSamples)]
    assert [one.prompt for one in drawn.pictures] == ["a bar"]


def test_what_gets_no_better_ends_early_and_is_told(
    services: Services, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = "--images", str(job.parent / "new"), "--name", "early", "--checkpoint-interval", "2"
    held = "--validation", "0.3", "--patience", "2", "--replace"
    still = "--learning-rate", "1e-12"
    asked = ["train", *images, *held, *still, "--steps", "50", *services.at, "--json"]
    assert command([*asked, "--keep", "2"]) == 3  # too few to tell
    assert "kept_checkpoint_count: 2 given" in capsys.readouterr().out
    assert command([*asked, "--keep", "3"]) == 0
    *told, ended = lines(capsys.readouterr().out)
    losses = [one["validation_loss"] for one in told if "validation_loss" in one]
    assert (ended["state"], ended["step"], ended["checkpoints"]) == ("completed", 6, [2, 4, 6])
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-6  # type: ignore[type-var,operator]

    moving = ["train", *images, *held, "--learning-rate", "0.02", "--steps", "8", *services.at]
    assert command([*moving, "--json"]) == 0
    *told, ended = lines(capsys.readouterr().out)
    losses = {one["step"]: one["validation_loss"] for one in told if "validation_loss" in one}
    assert len(set(losses.values())) == len(losses)
    assert ended["best"] == min(losses, key=losses.__getitem__)
    files = [tmp_path / "best", tmp_path / "of that step"]
    for file, more in zip(files, ([], ["--step", str(ended["best"])]), strict=True):
        export = "jobs", "export", str(ended["id"]), "-o", str(file), *more, *services.at
        assert command([*export]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    with Client(services.dit.address) as client:
        named = client.get_adapter("early")
    assert named.sha256 == hashlib.sha256(files[0].read_bytes()).hexdigest()


@pytest.mark.parametrize("path", LORAS, ids=lambda path: path.stem)
def test_an_example_runs(
    services: Services, job: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = "--images", str(job.parent / "known")
    small = "--side", "64", "--steps", "2", "--name", "example", "--replace"
    losses, _ = learnt(["train", "--config", str(path), *images, *small, *services.at], capsys)
    assert len(losses) == 2


def _stats(where: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    capsys.readouterr()
    assert command(["cache", "stats", "--json", *where]) == 0
    return {str(one["kind"]): int(str(one["count"])) for one in lines(capsys.readouterr().out)}


def _encoded(dit: Service) -> int:
    """How often it was asked for latents."""
    return sum("EncodeImages" in line for line in dit.log)
