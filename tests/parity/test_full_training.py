"""Learning the model's own weights, against the same with diffusers, and against itself."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from dit_service.model.loading import load_transformer, restore_transformer
from dit_service.model.transformer import ZImageTransformer
from dit_service.training import flow
from dit_service.training.training import Example, Training
from tests.training_examples import drawn_batch
from zimage_core.errors import InvalidRequest, NotReady
from zimage_core.planning.training import LearningRate, Noise, Optimizer, TrainingPlan

TOLERANCE = 1e-5  # of the reference's largest absolute value
CPU = torch.device("cpu")
PLAN = TrainingPlan(
    seed=5,
    step_count=4,
    full=True,
    noise=Noise("logit_normal"),
    learning_rate=LearningRate(1e-3, "cosine"),
    recompute="nothing",
    average_decay=0.9,
)
SIZES = [(8, 12), (16, 16), (10, 8)]
LENGTHS = [31, 64, 5]


@pytest.fixture
def model(model_folder: Path) -> ZImageTransformer:
    """One's own: it changes."""
    return load_transformer(model_folder, CPU, torch.float32)


def _batches(model: ZImageTransformer, count: int = 3) -> list[list[Example]]:
    return [drawn_batch(model.config.cap_feat_dim, SIZES, LENGTHS, one) for one in range(count)]


def _run(training: Training, batches: Sequence[list[Example]]) -> list[object]:
    outcomes: list[object] = []
    for batch in batches:
        training.learn(batch[:2], 0)
        training.learn(batch[2:], 2)
        outcomes.append(training.take_step())
    return outcomes


def _theirs(folder: Path) -> Any:
    return ZImageTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)


def _their_loss(theirs: Any, batch: list[Example], step: int) -> Tensor:
    total = torch.zeros(())
    for number, example in enumerate(batch):
        one = flow.noised(example.latents_CHW, PLAN.noise, PLAN.seed, step, number)
        [velocity] = theirs(
            [one.latents_CHW.unsqueeze(1)],
            torch.tensor([one.time]),
            [example.features_LF],
            return_dict=False,
        )[0]
        total = total + (velocity.squeeze(1) - one.velocity_CHW).square().mean() / len(batch)
    return total


def test_gradients_are_those_of_diffusers(model: ZImageTransformer, model_folder: Path) -> None:
    theirs, batch = _theirs(model_folder), _batches(model)[0]
    training = Training(model, "sdpa", PLAN)
    training.learn(batch, 0)
    loss = _their_loss(theirs, batch, 0)
    loss.backward()
    expected = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    found = {name: one.grad for name, one in training.weights.items() if one.grad is not None}
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    largest = max(one.abs().max() for one in expected.values())
    for name, one in expected.items():
        assert (found[name] - one).abs().max() <= TOLERANCE * largest, name
    assert abs(training.take_step().loss - loss.item()) <= TOLERANCE * loss.item()


def test_steps_lead_where_those_of_a_plain_loop_lead(
    model: ZImageTransformer, model_folder: Path, tmp_path: Path
) -> None:
    plan = replace(PLAN, average_decay=0.0)
    batches, theirs = _batches(model), _theirs(model_folder)
    training = Training(model, "sdpa", plan)
    _run(training, batches)
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=plan.optimizer.weight_decay)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = plan.learning_rate.at(step, plan.step_count)
        optimizer.zero_grad()
        _their_loss(theirs, batch, step).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), plan.optimizer.largest_gradient_norm)
        optimizer.step()
    before = dict(_theirs(model_folder).named_parameters())
    for name, one in theirs.named_parameters():
        moved = (one - before[name]).abs().max()
        # A first step of Adam goes all the way whatever the gradient's size: where that is noise
        # alone, so is the way.
        assert (training.weights[name] - one).abs().mean() <= 1e-3 * moved, name

    folder = tmp_path / "learnt"
    shutil.copytree(model_folder, folder)
    [file] = (folder / "transformer").glob("*.safetensors")
    save_file(dict(training.file_tensors(torch.float32)), file, metadata={"format": "pt"})
    again = dict(_theirs(folder).named_parameters())
    for name, one in training.weights.items():
        assert torch.equal(again[name], one), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_going_on_from_a_state_changes_no_bit(
    model: ZImageTransformer, model_folder: Path, optimizer: str, dtype: torch.dtype
) -> None:
    plan = replace(PLAN, optimizer=Optimizer(optimizer))
    batches = _batches(model, 4)
    whole = Training(load_transformer(model_folder, CPU, dtype), "sdpa", plan)
    expected = _run(whole, batches)
    own = load_transformer(model_folder, CPU, dtype)
    first = Training(own, "sdpa", plan)
    outcomes = _run(first, batches[:2])
    kept = {name: tensor.clone() for name, tensor in first.state().items()}
    first.close()
    other = load_transformer(model_folder, CPU, dtype)
    second = Training(other, "sdpa", plan, kept, first.step)
    outcomes += _run(second, batches[2:])
    assert outcomes == expected
    state = whole.state()
    for name, tensor in second.state().items():
        assert torch.equal(tensor, state.pop(name)), name
    assert not state


def test_small_steps_of_a_narrower_model_are_not_lost(model_folder: Path) -> None:
    """A step below the precision of bfloat16 moves nothing there; many of them do."""
    model = load_transformer(model_folder, CPU, torch.bfloat16)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    training = Training(model, "sdpa", replace(PLAN, learning_rate=LearningRate(1e-6)))
    _run(training, _batches(model))
    moved = {
        name: (one - before[name].float()).abs().max() for name, one in training.weights.items()
    }
    assert min(moved.values()) > 0
    for name, one in model.named_parameters():
        assert torch.equal(one, training.weights[name].bfloat16()), name
        assert one.grad is None


def test_what_was_learnt_can_be_undone(model: ZImageTransformer, model_folder: Path) -> None:
    training = Training(model, "sdpa", PLAN)
    _run(training, _batches(model, 1))
    training.close()
    fresh = load_transformer(model_folder, CPU, torch.float32).state_dict()
    assert not torch.equal(model.state_dict()["x_pad_token"], fresh["x_pad_token"])
    assert not any(one.requires_grad for one in model.parameters())
    restore_transformer(model, model_folder)
    for name, one in model.state_dict().items():
        assert torch.equal(one, fresh[name]), name


def test_what_cannot_begin_leaves_the_model_alone(model: ZImageTransformer) -> None:
    with pytest.raises(NotReady, match="adamw_8bit needs CUDA"):
        Training(model, "sdpa", replace(PLAN, optimizer=Optimizer("adamw_8bit")))
    with pytest.raises(InvalidRequest, match=r"open.state: .*without all_final_layer"):
        Training(model, "sdpa", PLAN, {"weights/x_pad_token": model.x_pad_token})
    assert not any(one.requires_grad for one in model.parameters())
