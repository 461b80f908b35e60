"""Checkpoints as files."""

import json
import zipfile
from pathlib import Path

import pytest

from zimage_core.errors import InvalidRequest
from zimage_core.formats import checkpoint_zip
from zimage_core.formats.checkpoint_zip import DATASET, WEIGHTS, Told, state_name
from zimage_core.wire import plain
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2

TOLD = Told(12, {"name": "glorp", "training": {"seed": 3}}, {0: 0.5, 1: 0.25})
STATE = state_name(0)
FILES = {
    WEIGHTS: b"adapter",
    STATE: b"state" * 1000,
    state_name(1): b"more",
    DATASET: b"{}",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    files = {name: tmp_path / f"from-{name}" for name in FILES}
    for name, data in FILES.items():
        files[name].write_bytes(data)
    checkpoint_zip.write(tmp_path / "it.zip", TOLD, files)
    return tmp_path / "it.zip"


def _again(archive: Path, change: dict[str, bytes | None], prefix: str = "") -> Path:
    """The same with other members, under other names."""
    changed = archive.with_name("changed.zip")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w") as new:
        members = {name: old.read(name) for name in old.namelist()} | change
        for name, data in members.items():
            if data is not None:
                new.writestr(prefix + name, data)
    return changed


@pytest.mark.parametrize("prefix", ["", "0000012_"])
def test_what_was_written_is_read(archive: Path, prefix: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    told = checkpoint_zip.read(_again(archive, {}, prefix), folder)
    assert (told.step, told.config) == (TOLD.step, TOLD.config)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    with zipfile.ZipFile(archive) as opened:
        assert {"checkpoint.json", "config.json", "iterator.json", "loss.json"} < set(
            opened.namelist()
        )
        listed = json.loads(opened.read("checkpoint.json"))["files"].values()
        assert set(listed) == set(opened.namelist()) - {"checkpoint.json"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({STATE: None}, "it has no optimizer.safetensors"),
        ({"optimizer.3.safetensors": b""}, "it has no optimizer.2.safetensors"),
        ({"config.json": b"["}, "config.json is no JSON object"),
        ({"iterator.json": b'{"num_iterations": -1}'}, "has no num_iterations"),
        ({"iterator.json": b'{"num_iterations": true}'}, "has no num_iterations"),
        ({"config.json": None}, "it has no config.json"),
    ],
)
def test_what_is_none_is_refused(
    archive: Path, change: dict[str, bytes | None], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        checkpoint_zip.read(_again(archive, change), tmp_path)


def test_a_bomb_and_a_text_are_refused(archive: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(archive) as old,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(64 << 20) if name == STATE else old.read(name))
    with pytest.raises(InvalidRequest, match="packed too well"):
        checkpoint_zip.read(bomb, tmp_path)
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(InvalidRequest, match="no checkpoint that can be gone on from"):
        checkpoint_zip.read(tmp_path / "text.zip", tmp_path)


def test_a_job_is_the_same_as_plain_values_and_back() -> None:
    spec = trainer_pb2.TrainJobSpec(
        name="glorp",
        batch_size=2,
        sides_px=[64, 96],
        captions=trainer_pb2.TrainJobSpec.CAPTIONS_ALL_FIRST,
        training=training_pb2.TrainingPlan(
            seed=-3,
            lora=training_pb2.LoraPlan(groups=[training_pb2.LoraGroup(rank=4, linears=["a"])]),
            learning_rate=training_pb2.LearningRatePlan(
                course=training_pb2.LearningRatePlan.COURSE_ONE_CYCLE, peak=0.25
            ),
        ),
    )
    again = trainer_pb2.TrainJobSpec()
    plain.fill(again, json.loads(json.dumps(plain.values(spec))))
    assert again == spec
