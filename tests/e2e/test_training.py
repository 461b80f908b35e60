"""Trainings through all three services: from pictures to an adapter to draw with."""

import io
import json
import re
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from tests.e2e.services import running
from tests.e2e.trainer import (
    Losses,
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
from zimage_client import Client, Options, Trainer, TrainJob, TrainStep
from zimage_client._embedded.stack import demo_model
from zimage_client.cli.main import main as command
from zimage_core.errors import NotFound
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2

pytestmark = pytest.mark.timeout(300)

STEPS, INTERVAL = 7, 3
PROMPT = "a large red circle in the middle on a blue background"
WISH = Options(seed=3, steps=4, guidance=0.0)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with three_services(tmp_path_factory.mktemp("trainer")) as three:
        yield three


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few, of several shapes, with captions of several lengths."""
    folder = tmp_path_factory.mktemp("data") / "frames"
    folder.mkdir()
    for number, size in enumerate([(128, 128), (160, 96), (96, 160), (200, 128), (128, 128)]):
        image = Image.new("RGB", size, (20 * number, 90, 200))
        ImageDraw.Draw(image).rectangle((20, 20, size[0] - 20, size[1] - 20), outline="white")
        image.save(folder / f"{number}.png")
        caption = "a white frame" + " on a large plain background" * number
        (folder / f"{number}.txt").write_text(caption)
    return folder


def _asked(pictures: Path, services: Services, *flags: str) -> list[str]:
    where = ["--images", str(pictures), "--trainer", services.trainer.address, "--isolated"]
    usual = [
        "--replace",
        "--steps",
        str(STEPS),
        "--checkpoint-interval",
        str(INTERVAL),
        "--batch-size",
        "2",
    ]
    return ["train", *where, *usual, *flags]


def test_pictures_become_an_adapter_that_pictures_are_drawn_with(
    services: Services, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--rank", "4", "--learning-rate", "0.01", "--side", "96", "--json"
    samples = "--sample", PROMPT, "--sample", "a frame", "--samples", str(tmp_path / "samples")
    assert command(_asked(pictures, services, "--name", "frames", *flags, *samples)) == 0
    said = capsys.readouterr()
    for foretold in ("rank 4 in layers 0 to 5", "GiB of the device: the model", "lasts about"):
        assert foretold in said.err
    *told, job = lines(said.out)
    steps = [one for one in told if "loss" in one]
    drawn = {one["step"]: one["samples"] for one in told if "samples" in one}
    assert sorted(drawn) == [3, 6, 7]
    assert [one["prompt"] for one in drawn[7]] == [PROMPT, "a frame"]  # type: ignore[attr-defined]
    looked_at = {step: [one["lost_detail"] for one in some] for step, some in drawn.items()}  # type: ignore[attr-defined]
    for first, second in looked_at.values():  # the demo model counts as Turbo
        assert first < 1
        assert second is None
    files = sorted((tmp_path / "samples").iterdir())
    assert len(files) == 6
    assert len({file.read_bytes() for file in files}) == 6
    sizes = {Image.open(io.BytesIO(file.read_bytes())).size for file in files}
    assert sizes == {(96, 96)}
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert job["state"] == "completed"
    assert job["checkpoints"] == [3, 6, 7]

    with Client(services.dit.address) as client:
        adapter = client.get_adapter("frames")
        assert adapter.rank == 4
        assert adapter.linear_count == 6 * 7  # of the demo model's six layers
        plain = client.generate(PROMPT, **WISH).pictures[0]
        changed = client.generate(PROMPT, **WISH, adapters={"frames": 1.0}).pictures[0]
    assert plain.pixels_sha256 != changed.pixels_sha256

    with Trainer(services.trainer.address) as trainer:
        told = list(trainer.watch(str(job["id"]), only_past=True))
        assert [one.step for one in told if isinstance(one, TrainStep)] == list(range(STEPS))
        [mine] = [one for one in trainer.jobs() if one.id == job["id"]]
        assert mine == trainer.get(mine.id)
        assert mine.best == mine.checkpoints[-1]
    where = at(services.trainer)
    file = tmp_path / "frames.safetensors"
    assert command(["jobs", "export", str(job["id"]), "-o", str(file), *where]) == 0
    with safe_open(file, framework="pt") as tensors:
        assert len(list(tensors.keys())) == 2 * 6 * 7
        told = tensors.metadata()
    assert (told["model_type"], told["lora_rank"], told["lora_alpha"]) == ("zimage", "4", "4")
    assert json.loads(told["training_plan"])["learning_rate"]["peak"] == 0.01

    one_step = _asked(pictures, services, "--name", "beside", *flags[:-1], "--steps", "1")
    alone, _ = learnt(one_step, capsys)
    beside, _ = learnt([*one_step, "--training-adapter", str(file)], capsys)
    assert beside != alone

    again = [one for one in _asked(pictures, services, "--name", "frames") if one != "--replace"]
    assert command(again) == 3
    assert "frames given, allowed is a name that no adapter has" in capsys.readouterr().err
    capsys.readouterr()
    plot = tmp_path / "loss.svg"
    assert command(["jobs", "logs", str(job["id"]), "--json", "--plot", str(plot), *where]) == 0
    assert lines(capsys.readouterr().out) == steps
    points = re.findall(r'points="([^"]*)"', plot.read_text())
    assert [len(one.split()) for one in points] == [STEPS, STEPS]
    assert command(["jobs", "list", "--json", *where]) == 0
    assert job in lines(capsys.readouterr().out)


def test_the_same_again_learns_the_same_from_what_is_kept(
    services: Services, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name in ("once", "twice"):
        assert command(_asked(pictures, services, "--name", name, "--seed", "4", "--json")) == 0
        runs.append(lines(capsys.readouterr().out))
    first, second = ([(step["loss"], step["gradient_norm"]) for step in run[:-1]] for run in runs)
    assert first == second
    assert len(set(first)) == STEPS
    encoded = [line for line in services.dit.log if "EncodeImages" in line]
    assert len(encoded) <= 2 * 5  # five pictures in two sizes, whatever number of jobs


LONGER = "--steps", "24", "--checkpoint-interval", "4", "--seed", "9"


@pytest.fixture(scope="module")
def expected(services: Services, pictures: Path) -> Losses:
    """What is learnt in those steps when nothing breaks."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert command(_asked(pictures, services, *LONGER, "--name", "whole", "--json")) == 0
    return decisive(lines(out.getvalue())[:-1])


def _watched(job: str, where: list[str], capsys: pytest.CaptureFixture[str]) -> Losses:
    """What was learnt by the end."""
    capsys.readouterr()
    assert command(["jobs", "watch", job, "--json", *where]) == 0
    *learnt, end = lines(capsys.readouterr().out)
    assert end["state"] == "completed"
    return decisive(learnt)


def test_what_breaks_on_the_way_changes_no_loss(
    services: Services, pictures: Path, expected: Losses, capsys: pytest.CaptureFixture[str]
) -> None:
    where = at(services.trainer)
    job = begun(_asked(pictures, services, *LONGER, "--name", "broken", "--detach"), capsys)

    wait(job, where, capsys, lambda shown: int(str(shown["step"])) >= 6)
    services.dit.worker.kill()
    wait(job, where, capsys, lambda shown: shown["state"] == "waiting")
    wait(job, where, capsys, lambda shown: int(str(shown["step"])) >= 10)
    assert command(["jobs", "pause", job, *where]) == 0
    rested = wait(job, where, capsys, lambda shown: shown["state"] == "paused")
    assert rested["step"] == rested["checkpoints"][-1]  # type: ignore[index]
    assert command(["jobs", "resume", job, *where]) == 0
    assert _watched(job, where, capsys) == expected


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_trainer_that_stands_by_goes_on_where_the_first_ends(
    services: Services,
    pictures: Path,
    expected: Losses,
    how: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = "--store", str(tmp_path / "store"), "--database", f"sqlite:///{tmp_path}/jobs"
    flags = "--encoder", services.encoder.address, "--dit", services.dit.address, *places
    with running("trainer_service", *flags) as first:
        first.wait_until("SERVING")
        where = at(first)
        asked = _asked(pictures, replace(services, trainer=first), *LONGER, "--detach")
        job = begun(asked, capsys)
        wait(job, where, capsys, lambda shown: int(str(shown["step"])) >= 2)
        with running("trainer_service", *flags) as second:
            second.wait_until("NOT_SERVING")
            wait(job, where, capsys, lambda shown: int(str(shown["step"])) >= 6)
            first.process.send_signal(how)
            assert first.wait_for_exit() == (0 if how == signal.SIGTERM else -how)
            second.wait_until("SERVING")
            assert _watched(job, at(second), capsys) == expected


def test_a_file_of_a_checkpoint_is_gone_on_from(
    services: Services,
    pictures: Path,
    expected: Losses,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where, all_states = services.at, tmp_path / "job.toml"
    all_states.write_text("kept_state_count = 6")
    more = "--config", str(all_states), "--name", "filed", "--detach"
    job, file = begun(_asked(pictures, services, *LONGER, *more), capsys), tmp_path / "filed.zip"
    wait(job, where, capsys, lambda shown: 12 in shown["checkpoints"])  # type: ignore[operator]
    assert command(["jobs", "cancel", job, *where]) == 0
    export = ["jobs", "export", job, "--step", "12", "--zip", "-o", str(file), *where]
    assert command(export) == 0
    assert command(["jobs", "delete", job, *where]) == 0

    again = ["train", "--checkpoint", str(file), "--replace", *where]
    losses, ended = learnt(again, capsys)
    assert losses == expected[12:]
    assert (ended["name"], ended["checkpoints"]) == ("filed", [16, 20, 24])
    assert command([*again, "--images", str(pictures)]) == 2
    file.write_bytes(file.read_bytes()[:-100])
    assert command(again) == 3
    assert "no checkpoint that can be gone on from" in capsys.readouterr().err


def test_jobs_that_share_a_device_learn_what_each_learns_alone(
    services: Services,
    pictures: Path,
    expected: Losses,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = "--jobs-at-once", "2"
    with training_with(services.encoder.address, services.dit.address, tmp_path, more) as trainer:
        asked = _asked(pictures, replace(services, trainer=trainer), *LONGER, "--detach")
        jobs = []
        for name in ("one", "other"):
            jobs.append(begun([*asked, "--name", name], capsys))
        for job in jobs:
            wait(job, at(trainer), capsys, lambda shown: 1 <= int(str(shown["step"])) < 24)
        with Client(services.dit.address) as client:  # whom neither keeps waiting for long
            client.generate(PROMPT, **WISH, priority="interactive")
        for job in jobs:
            assert _watched(job, at(trainer), capsys) == expected


def test_a_job_can_be_ended(
    services: Services, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = at(services.trainer)
    asked = _asked(pictures, services, "--name", "never", "--steps", "100000", "--detach")
    job = begun(asked, capsys)
    wait(job, where, capsys, lambda shown: int(str(shown["step"])) > 0)
    with Client(services.dit.address) as client:  # pictures are the same beside it
        beside = client.generate(PROMPT, **WISH, packing="solo").pictures[0]
        assert show(job, where, capsys)["state"] == "running"
        assert command(["jobs", "cancel", job, *where]) == 0
        alone = client.generate(PROMPT, **WISH, packing="solo").pictures[0]
    assert beside.pixels_sha256 == alone.pixels_sha256
    assert show(job, where, capsys)["state"] == "cancelled"
    assert command(["jobs", "watch", job, *where]) == 1
    assert command(["jobs", "resume", job, *where]) == 3
    assert "does not go on" in capsys.readouterr().err
    assert command(["jobs", "show", "job-of-nobody", *where]) == 3


def test_what_cannot_be_learnt_from_is_named(
    services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (128, 128)).save(tmp_path / "without.png")
    Image.new("RGB", (128, 20)).save(tmp_path / "flat.png")
    (tmp_path / "flat.txt").write_text("flat")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("broken")
    assert command(_asked(tmp_path, services)) == 3
    said = capsys.readouterr().err
    for fault in (
        "1 without a text file beside it: without.png",
        "1 with a side of less than 64 pixels: flat.png",
        "not a readable PNG, JPEG or WebP file",
    ):
        assert fault in said
    assert command(_asked(tmp_path / "nowhere", services)) == 3
    assert "there is no such folder" in capsys.readouterr().err


def test_what_a_job_would_be_is_known_before_its_pictures_are_sent(services: Services) -> None:
    example = Example("0" * 64, 100, 128, 128, "frame.png", "a frame")
    spec = _thought_of([example, replace(example, caption="a longer caption" * 20)], services)
    spec.batch_size = 0
    with Trainer(services.trainer.address) as trainer:
        expected = trainer.plan(spec)
        assert expected.spec.batch_size == 2  # of so few
        assert expected.spec.training.lora.groups[0].rank == 16
        needs = expected.needs
        assert needs
        assert 0 < needs.learnt_bytes < needs.weights_bytes
        assert needs.room_bytes is None  # a host's memory is not the service's to plan
        assert needs.step_seconds
        assert any("--training-adapter" in one for one in expected.warnings)
        with pytest.raises(NotFound, match=r"pictures that were not sent: frame\.png"):
            trainer.train(spec)
        assert not trainer.jobs() or trainer.jobs()[0].name != spec.name


def _thought_of(examples: list[Example], services: Services) -> trainer_pb2.TrainJobSpec:
    file = services.folder / "thought-of.jsonl"
    file.write_bytes(dataset_file.dump(examples))
    spec = trainer_pb2.TrainJobSpec(name="thought-of")
    with Trainer(services.trainer.address) as trainer:
        spec.dataset.sha256 = trainer.put_blob(file)
    spec.training.step_count = 1
    return spec


def test_what_the_dit_service_refuses_is_refused_before_a_job_is_begun(
    services: Services, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(_asked(pictures, services, "--name", "large", "--rank", "5000")) == 3
    assert "lora.groups[0].rank: 5000 given, allowed is 1 to 1024" in capsys.readouterr().err
    with Trainer(services.trainer.address) as trainer:
        assert not any(one.name == "large" for one in trainer.jobs())


def test_another_dit_service_knows_an_adapter_and_refuses_what_finds_no_room(
    services: Services, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--encoder", services.encoder.address, "--store", str(services.folder / "dit")
    small = "--max-step-bytes", str(32 << 20)
    with running("dit_service", "--model", str(demo_model()), *flags, *small) as dit:
        dit.wait_until("SERVING")
        with training_with(services.encoder.address, dit.address, tmp_path) as trainer:
            asked = _asked(pictures, replace(services, trainer=trainer), "--name", "roomy")
            asked += ["--batch-size", "16", "--steps", "1", "--json"]
            assert command(asked) == 0  # one at a time
            capsys.readouterr()
            job = tmp_path / "job.toml"
            job.write_text("[training]\nsamples_at_once = 16")
            assert command([*asked, "--config", str(job)]) == 3
            refused = capsys.readouterr().out
            with Trainer(trainer.address) as client:
                [before] = client.jobs()
                spec = before.spec
                spec.training.samples_at_once = 16
                spec.training.recompute = training_pb2.TrainingPlan.RECOMPUTE_BLOCKS
                *_, failed = client.watch(client.train(spec).id)
        drawn = set()
        for one in (dit, services.dit):
            with Client(one.address, services.encoder.address) as client:
                made = client.generate(PROMPT, **WISH, adapters={"roomy": 1.0})
                drawn.add(made.pictures[0].pixels_sha256)
    assert len(drawn) == 1
    assert isinstance(failed, TrainJob)
    for said in (refused, str(failed.failure)):  # the service has the last word
        assert "16 samples at once, recompute blocks: that takes" in said
        assert "fewer samples_at_once" in said


def test_a_job_belongs_to_the_project_that_made_it(
    services: Services, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, roles = tmp_path / "tokens.toml", '["train", "generate"]'
    owners = {"mine": "posters", "other": "films"}
    tokens.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\ntoken = "{name * 8}"\nroles = {roles}\n'
            f'project = "{project}"\n'
            for name, project in owners.items()
        )
    )
    files = {name: tmp_path / name for name in owners}
    for name, file in files.items():
        file.write_text(name * 8)
    places = "--store", str(tmp_path / "store"), "--database", f"sqlite:///{tmp_path}/jobs"
    flags = "--encoder", services.encoder.address, "--dit", services.dit.address, *places
    with running("trainer_service", *flags, "--tokens", str(tokens)) as trainer:
        trainer.wait_until("SERVING")
        asked = _asked(pictures, replace(services, trainer=trainer), "--detach")
        job = begun([*asked, "--token-file", str(files["mine"])], capsys)
        where = [*at(trainer), "--token-file"]
        assert show(job, [*where, str(files["mine"])], capsys)["id"] == job
        assert command(["jobs", "show", job, *where, str(files["other"])]) == 3
        assert command(["jobs", "cancel", job, *where, str(files["other"])]) == 3
        capsys.readouterr()
        assert command(["jobs", "list", *where, str(files["other"])]) == 0
        assert capsys.readouterr().out == ""


def test_a_job_moves_to_another_dit_service_and_learns_the_same(
    services: Services,
    pictures: Path,
    expected: Losses,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = "--model", str(demo_model())
    encoder = "--encoder", services.encoder.address
    with (
        running("dit_service", *model, *encoder, "--store", str(tmp_path / "a")) as first,
        running("dit_service", *model, *encoder, "--store", str(tmp_path / "b")) as second,
    ):
        for dit in (first, second):
            dit.wait_until("SERVING")
        both = f"{first.address},{second.address}"
        with training_with(services.encoder.address, both, tmp_path) as trainer:
            asked = _asked(pictures, replace(services, trainer=trainer), *LONGER, "--detach")
            job, where = begun([*asked, "--checkpoint-interval", "100"], capsys), at(trainer)
            wait(job, where, capsys, lambda shown: int(str(shown["step"])) >= 6)
            first.process.send_signal(signal.SIGTERM)
            assert _watched(job, where, capsys) == expected
            [moved, last] = show(job, where, capsys)["checkpoints"]  # type: ignore[misc]
    assert 6 <= moved < last == 24  # it took one as it was told to stop, and lost nothing
