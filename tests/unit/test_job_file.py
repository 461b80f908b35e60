"""What a job's file asks for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zimage_client import _job_file
from zimage_client._job_file import JobFile
from zimage_core.errors import InvalidRequest
from zimage_core.formats.dataset_file import Example
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2

EXAMPLES = [Example(str(n) * 64, 1, 64, 64, str(n), "x", repeats=2) for n in range(5)]

LORA = """
{
  "model": "z-image",
  "mode": "lora",
  "seed": 42,
  "steps": 50,
  "guidance": 3.5,
  "width": 1024,
  "height": 1024,
  "training_loop": {
    "num_epochs": 10,
    "batch_size": 16
  },
  "optimizer": {
    "name": "AdamW",
    "learning_rate": 1e-4
  },
  "lora_layers": {
    "main_layers": {
      "block_range": {"start": 0, "end": 30},
      "layer_types": ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"],
      "lora_rank": 32
    }
  },
  "save": {
    "checkpoint_frequency": 500,
    "output_path": "~/z_image_lora"
  },
  "examples": {
    "path": "./images",
    "images": [
      {"image": "img1.jpg", "prompt": "description 1"},
      {"image": "img2.jpg", "prompt": "description 2"}
    ]
  }
}
"""


FULL = """{
  "model": "z-image",
  "mode": "full",
  "seed": 42,
  "training_loop": {
    "num_epochs": 5,
    "batch_size": 8,
    "gradient_accumulation_steps": 4
  },
  "optimizer": {
    "name": "AdamW",
    "learning_rate": 1e-5
  },
  "full_finetune": {
    "train_transformer": true,
    "train_vae": false,
    "train_text_encoder": false
  }
}
"""


def _file(folder: Path, text: str, name: str = "job.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_says_all_of_a_job(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        """
        name = "glorp"
        batch_size = 4
        epochs = 3
        captions = "all-first"
        [training]
        seed = 7
        recompute = "nothing"
        learning_rate = { peak = 1e-3, course = "one-cycle" }
        [[training.lora.groups]]
        rank = 4
        [[training.lora.groups]]
        stack = "noise_refiner"
        [data]
        trigger = "glorp"
        [[data.folders]]
        path = "new"
        repeats = 10
        flips = true
        [[data.folders]]
        path = "/known"
        regularization = true
        weight = 0.5
        """,
    )
    job = _job_file.read(path)
    spec = _job_file.spec(job, {"training.lora.groups[].alpha": 2.0, "name": None}, EXAMPLES)
    assert (spec.name, spec.batch_size, spec.training.seed) == ("glorp", 4, 7)
    assert spec.training.step_count == 8  # thirty samples by fours
    assert spec.captions == trainer_pb2.TrainJobSpec.CAPTIONS_ALL_FIRST
    assert spec.training.recompute == training_pb2.TrainingPlan.RECOMPUTE_NOTHING
    assert spec.training.learning_rate.course == training_pb2.LearningRatePlan.COURSE_ONE_CYCLE
    assert [(one.stack, one.rank, one.alpha) for one in spec.training.lora.groups] == [
        ("", 4, 2.0),
        ("noise_refiner", 0, 2.0),
    ]
    assert job.data is not None
    new, known = job.data.sources()
    assert (new.folder, new.trigger, new.repeats, new.flips) == (
        tmp_path / "new",
        "glorp",
        10,
        True,
    )
    assert (known.folder, known.trigger, known.weight) == (Path("/known"), "", 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nam = 'x'", "nam: x given, allowed is name, .*; nearest name"),
        ("batch_size = 'x'", "batch_size: x given, allowed is a whole number"),
        ("batch_size = 5000000000", "batch_size: 5000000000 given"),
        ("[training.optimizer]\nname = 'adam'", "training.optimizer.name: adam given, .*adamw"),
        ("[training.lora]\ngroups = 3", r"training\.lora\.groups: 3 given, allowed is a list"),
        ("[[training.lora.groups]]\nrang = 3", r"groups\[0\]\.rang: .* nearest rank"),
        ("training = 3", "training: 3 given, allowed is a table"),
        ("epochs = 0", "epochs: 0 given"),
        ("[data]\nfolder = 'x'", r"data\.folder"),
        ("[[data.folders]]\npath = 'x'\nrepeats = 0", r"data\.folders\.0\.repeats: 0 given"),
        ("[dataset]\nsha256 = 'x'", "dataset: .* pictures under data"),
        ("name = ", "job.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        _job_file.spec(_job_file.read(_file(tmp_path, text)), {}, EXAMPLES)


@pytest.mark.parametrize(
    ("text", "overriding", "said"),
    [
        ("epochs = 2\nbatch_size = 0", {}, "batch_size: 0 given"),
        ("epochs = 2\n[training]\nstep_count = 5", {}, "epochs: beside training.step_count"),
        ("training = 3", {"training.seed": 1}, "seed: 3 given, allowed is a table"),
    ],
)
def test_what_contradicts_itself_is_named(
    tmp_path: Path, text: str, overriding: dict[str, object], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        _job_file.spec(_job_file.read(_file(tmp_path, text)), overriding, EXAMPLES)


def test_no_steps_are_not_the_usual_ones(tmp_path: Path) -> None:
    spec = _job_file.spec(JobFile(), {"training.step_count": 0}, EXAMPLES)
    assert spec.training.step_count == 0  # which the trainer refuses
    assert _job_file.spec(JobFile(), {}, EXAMPLES).training.step_count == 1500
    job = _job_file.read(_file(tmp_path, "[training]\nstep_count = 5"))
    again = replace(_job_file.without_steps(job), epochs=2)
    assert _job_file.spec(again, {}, EXAMPLES).training.step_count == 20


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    job = _job_file.read(_file(tmp_path, "[training]\nseed = 3\nstep_count = 9"))
    overriding = {"training.seed": 4, "training.lora.groups[].rank": 2, "sides_px": [64]}
    spec = _job_file.spec(job, overriding, EXAMPLES)
    assert (spec.training.seed, spec.training.step_count) == (4, 9)
    assert [group.rank for group in spec.training.lora.groups] == [2]
    assert list(spec.sides_px) == [64]


def test_mflux_examples_are_read_as_they_are(tmp_path: Path) -> None:
    job = _job_file.read(_file(tmp_path, LORA, "lora_config.json"))
    spec = _job_file.spec(job, {}, EXAMPLES[:2])
    training = spec.training
    assert (spec.name, spec.batch_size, list(spec.sides_px)) == ("z_image_lora", 16, [1024])
    assert (training.seed, training.samples_at_once) == (42, 16)
    assert training.step_count == 3  # ten epochs of four by sixteens
    assert (training.noise.distribution, training.noise.step_count) == (
        training_pb2.NoisePlan.DISTRIBUTION_SCHEDULE,
        50,
    )
    [group] = training.lora.groups
    assert (group.stack, group.first_block, group.end_block, group.rank) == ("layers", 0, 30, 32)
    assert list(group.linears) == [
        f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert spec.checkpoint_interval_steps == 500
    assert job.data is not None
    [source] = job.data.sources()
    assert source.folder == tmp_path / "images"
    assert source.pictures == (("img1.jpg", "description 1"), ("img2.jpg", "description 2"))


def test_mflux_s_full_example_is_read_as_it_is(tmp_path: Path) -> None:
    job = _job_file.read(_file(tmp_path, FULL, "full_config.json"))
    assert job.data is None  # which is said with --images
    spec = _job_file.spec(job, {}, [Example("0" * 64, 1, 64, 64, "a.png", "x")] * 20)
    training = spec.training
    assert training.full
    assert not training.HasField("lora")
    assert (spec.batch_size, training.samples_at_once) == (32, 8)
    assert training.step_count == 4  # five epochs of twenty by 32
    assert training.learning_rate.peak == 1e-5
    assert training.recompute == training_pb2.TrainingPlan.RECOMPUTE_UNSPECIFIED
    kept = json.dumps({**json.loads(FULL), "full_finetune": {"gradient_checkpointing": False}})
    job = _job_file.read(_file(tmp_path, kept, "kept.json"))
    assert job.values["training"]["recompute"] == "nothing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"full_finetune": {"train_vae": True}}, "full_finetune.train_vae: true given.*VAE stays"),
        ({"full_finetune": {"train_text_encoder": True}}, "train_text_encoder.*encoder service"),
        ({"mode": "full"}, "lora_layers: some given, allowed is none with mode full"),
        ({"full_finetune": {"train_transformer": False}}, "train_transformer: false given"),
        ({"model": "flux"}, "model: flux given"),
        ({"training_lop": {}}, "training_lop: .* nearest training_loop"),
        ({"optimizer": {"name": "Lion"}}, "optimizer.name: Lion given, allowed is AdamW, Adam"),
        ({"early_stopping": {"enabled": 1}}, "early_stopping.enabled: 1 given, allowed is true"),
        ({"save": {"keep_last_n_checkpoints": "3"}}, "checkpoints: 3 given, allowed is a whole"),
        ({"training_loop": {"num_epochs": "x"}}, "num_epochs: x given, allowed is a whole number"),
        ({"examples": {"images": 3}}, "examples.images: 3 given, allowed is a list"),
        ({"examples": {"images": [{"mask": "x"}]}}, r"examples.images\[0\].mask"),
        ({"examples": {"images": [3]}}, r"examples.images\[0\]: 3 given, allowed is an object"),
    ],
)
def test_what_mflux_has_and_we_have_not_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    text = json.dumps({**json.loads(LORA), **change})
    with pytest.raises(InvalidRequest, match=said):
        _job_file.read(_file(tmp_path, text, "config.json"))
