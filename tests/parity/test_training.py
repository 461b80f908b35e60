"""A training step against the same with diffusers and peft, and against itself by other ways."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from dit_service.model.loading import load_transformer
from dit_service.model.transformer import ZImageTransformer
from dit_service.sampling.euler import text_to_image
from dit_service.sampling.forwards import Run
from dit_service.training import flow, lora
from dit_service.training.training import Example, Training
from tests.training_examples import drawn_batch
from zimage_core.errors import InvalidRequest, NotReady
from zimage_core.planning.training import (
    LearningRate,
    LoraGroup,
    Noise,
    Optimizer,
    Target,
    TrainingPlan,
    targets,
)

TOLERANCE = 1e-5  # of the reference's largest absolute value
CPU = torch.device("cpu")
LINEARS = (
    "attention.to_q",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "adaLN_modulation.0",
)
PLAN = TrainingPlan(
    seed=5,
    step_count=8,
    lora=(
        LoraGroup("layers", 0, 4, LINEARS, rank=4, alpha=6.0),
        LoraGroup("noise_refiner", 0, 1, LINEARS[:2], rank=2, alpha=2.0),
        LoraGroup("context_refiner", 0, 1, ("attention.to_v", "feed_forward.w3"), 3, 3.0),
    ),
    noise=Noise("logit_normal", shift=2.0),
    optimizer=Optimizer(),
    learning_rate=LearningRate(1e-3, "cosine", warmup_step_count=2),
    samples_at_once=2,
    recompute="nothing",
    average_decay=0.9,
)
SIZES = [(8, 12), (16, 16), (10, 8), (8, 8)]
LENGTHS = [31, 70, 1, 200]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ZImageTransformer:
    return load_transformer(model_folder, CPU, torch.float32).requires_grad_(False)


def _batch(model: ZImageTransformer, number: int = 0) -> list[Example]:
    return drawn_batch(model.config.cap_feat_dim, SIZES, LENGTHS, number)


def _used(model: ZImageTransformer) -> dict[str, Tensor]:
    """A state in which the second halves are no zeros: gradients reach the first."""
    weights = lora.fresh(targets(PLAN.lora, model.config), PLAN.seed)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith(lora.UP):
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return {f"weights/{name}": weight for name, weight in weights.items()}


def _learn(training: Training, batch: Sequence[Example], at_once: int) -> None:
    for first in range(0, len(batch), at_once):
        training.learn(batch[first : first + at_once], first)


def _gradients(training: Training) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in training.weights.items()}


def _assert_close(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(one.abs().max() for one in expected.values())
    assert given.keys() == expected.keys()
    for name, one in given.items():
        assert (one - expected[name]).abs().max() <= TOLERANCE * largest, name


def _theirs(folder: Path, weights: dict[str, Tensor], changed: dict[str, Target]) -> Any:
    """Diffusers' transformer with peft's layers, which hold our weights."""
    theirs = ZImageTransformer2DModel.from_pretrained(
        folder / "transformer", low_cpu_mem_usage=False
    )
    theirs.requires_grad_(False)
    config = LoraConfig(
        target_modules=list(changed),
        rank_pattern={f"^{name}": one.rank for name, one in changed.items()},
        alpha_pattern={f"^{name}": one.alpha for name, one in changed.items()},
    )
    theirs.add_adapter(config)
    for linear in changed:
        module = theirs.get_submodule(linear)
        for half, name in ((module.lora_A, lora.DOWN), (module.lora_B, lora.UP)):
            half["default"].weight.data.copy_(weights[f"weights/{linear}.{name}"])
    return theirs


def test_loss_and_gradients_are_those_of_diffusers_and_peft(
    model: ZImageTransformer, model_folder: Path
) -> None:
    state, changed, batch = _used(model), targets(PLAN.lora, model.config), _batch(model)
    training = Training(model, "sdpa", PLAN, state)
    training.learn(batch, 0)
    theirs = _theirs(model_folder, state, changed)
    total = 0.0
    for number, example in enumerate(batch):
        one = flow.noised(example.latents_CHW, PLAN.noise, PLAN.seed, 0, number)
        [velocity] = theirs(
            [one.latents_CHW.unsqueeze(1)],
            torch.tensor([one.time]),
            [example.features_LF],
            return_dict=False,
        )[0]
        missing = velocity.squeeze(1) - one.velocity_CHW
        loss = missing.square().mean() / len(batch)
        loss.backward()
        total += float(loss.detach())
    halves = (("lora_A", lora.DOWN), ("lora_B", lora.UP))
    expected = {
        f"{linear}.{name}": getattr(theirs.get_submodule(linear), half)["default"].weight.grad
        for linear in changed
        for half, name in halves
    }
    _assert_close(_gradients(training), expected)
    assert abs(training.take_step().loss - total) <= TOLERANCE * total


@pytest.mark.parametrize("recompute", ["nothing", "blocks"])
def test_a_batch_of_all_lengths_learns_what_its_samples_learn_alone(
    model: ZImageTransformer, recompute: Any
) -> None:
    plan, state, batch = replace(PLAN, recompute=recompute), _used(model), _batch(model)
    together, alone = (Training(model, "sdpa", one, state) for one in (plan, PLAN))
    _learn(together, batch, 4)
    _learn(alone, batch, 1)
    _assert_close(_gradients(together), _gradients(alone))
    one, other = together.take_step(), alone.take_step()
    assert abs(one.loss - other.loss) <= TOLERANCE * other.loss
    assert abs(one.gradient_norm - other.gradient_norm) <= TOLERANCE * other.gradient_norm


@pytest.mark.parametrize(
    ("recompute", "interval"),
    [("elementwise", 1), ("elementwise", 3), ("blocks", 1), ("blocks", 2), ("offloaded", 1)],
)
def test_what_is_computed_again_changes_no_bit(
    model: ZImageTransformer, recompute: str, interval: int
) -> None:
    way = replace(PLAN, recompute=recompute, recompute_interval=interval)
    kept, again = (Training(model, "sdpa", plan, _used(model)) for plan in (PLAN, way))
    for training in (kept, again):
        _learn(training, _batch(model), 2)
    for name, gradient in _gradients(kept).items():
        assert torch.equal(gradient, again.weights[name].grad), name


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_going_on_from_a_state_changes_no_bit(model: ZImageTransformer, optimizer: str) -> None:
    plan = replace(PLAN, optimizer=Optimizer(optimizer))
    batches = [_batch(model, number) for number in range(6)]

    def run(training: Training, batches: Sequence[list[Example]]) -> list[object]:
        outcomes = []
        for batch in batches:
            _learn(training, batch, PLAN.samples_at_once)
            outcomes.append(training.take_step())
        return outcomes

    whole = Training(model, "sdpa", plan)
    expected = run(whole, batches)
    first = Training(model, "sdpa", plan)
    outcomes = run(first, batches[:3])
    kept = dict(sorted(first.state().items()))  # as a file has it
    second = Training(model, "sdpa", plan, kept, first.step)
    outcomes += run(second, batches[3:])
    assert outcomes == expected
    assert len({outcome.loss for outcome in expected}) == len(batches)
    state = whole.state()
    for name, tensor in second.state().items():
        assert torch.equal(tensor, state.pop(name)), name
    assert not state
    written = dict(second.file_tensors(torch.float32))
    for name, tensor in whole.file_tensors(torch.float32):
        assert torch.equal(tensor, written[name])


def test_what_is_beside_counts_and_is_not_learnt(model: ZImageTransformer) -> None:
    state, changed = _used(model), targets(PLAN.lora, model.config)
    weights = {name.removeprefix("weights/"): tensor for name, tensor in state.items()}
    beside = lora.Lora(changed, model, PLAN.seed, weights).uses(weights)
    own = Training(model, "sdpa", PLAN, state)
    other = Training(model, "sdpa", PLAN, beside=beside)  # whose own weights change nothing yet
    plain = Training(model, "sdpa", PLAN)
    losses = []
    for training in (own, other, plain):
        _learn(training, _batch(model), 2)
        losses.append(training.take_step().loss)
    assert abs(losses[1] - losses[0]) <= TOLERANCE * losses[0]
    assert abs(losses[2] - losses[0]) > TOLERANCE * losses[0]
    assert (
        dict(other.file_tensors(torch.float32)).keys()
        == dict(own.file_tensors(torch.float32)).keys()
    )
    assert other.state().keys() == own.state().keys()


def test_an_optimiser_that_needs_cuda_is_refused_elsewhere(model: ZImageTransformer) -> None:
    plan = replace(PLAN, optimizer=Optimizer("adamw_8bit"))
    with pytest.raises(NotReady, match="adamw_8bit needs CUDA, and this service computes on cpu"):
        Training(model, "sdpa", plan)


def test_a_mask_counts_what_it_marks_by_its_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    wanted_CHW, missing_CHW = (torch.randn(16, 6, 4, generator=generator) for _ in range(2))
    mask_HW = torch.zeros(6, 4)
    mask_HW[1:3, 2], mask_HW[5, 0] = 1.0, 0.5
    found = flow.loss(wanted_CHW + missing_CHW, wanted_CHW, mask_HW)
    squares = missing_CHW.square().mean(0)
    expected = (squares[1, 2] + squares[2, 2] + 0.5 * squares[5, 0]) / 2.5
    assert torch.isclose(found, expected)
    everywhere = flow.loss(wanted_CHW + missing_CHW, wanted_CHW, torch.ones(6, 4))
    assert torch.isclose(everywhere, flow.loss(wanted_CHW + missing_CHW, wanted_CHW))


def test_what_is_looked_at_is_what_would_be_lost_with_the_average(
    model: ZImageTransformer,
) -> None:
    training = Training(model, "sdpa", PLAN, _used(model))
    _learn(training, _batch(model), 2)
    training.take_step()
    before = {name: tensor.clone() for name, tensor in training.state().items()}
    example = _batch(model, 7)[0]
    lost = training.loss_of(example, 3)
    assert lost == training.loss_of(example, 3)
    assert lost != training.loss_of(example, 4)  # its noise is that of its place
    for name, tensor in training.state().items():
        assert torch.equal(tensor, before[name])
    average = {
        name.replace("average/", "weights/"): tensor
        for name, tensor in before.items()
        if name.startswith("average/")
    }
    other = Training(model, "sdpa", replace(PLAN, average_decay=0.0), average)
    assert other.loss_of(example, 3) == lost


@pytest.mark.parametrize(
    "noise", [Noise(), Noise("logit_normal", shift=3.0), Noise("schedule", shift=3.0)]
)
def test_fixed_amounts_of_noise_lie_among_those_that_are_learnt(noise: Noise) -> None:
    latents_CHW = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    learnt = sorted(flow.noised(latents_CHW, noise, 1, n).time for n in range(2000))
    for level in range(4):
        quantile = (level + 0.5) / 4
        placed = flow.placed(latents_CHW, noise, quantile, 1, 0)
        rank = sum(1 - time < 1 - placed.time for time in learnt) / len(learnt)
        assert abs(rank - quantile) < 0.05


def test_weights_scale_what_a_sample_says(model: ZImageTransformer) -> None:
    once, twice = (Training(model, "sdpa", PLAN, _used(model)) for _ in range(2))
    _learn(once, _batch(model), 2)
    _learn(twice, [replace(one, share=2 * one.share) for one in _batch(model)], 2)
    for name, gradient in _gradients(once).items():
        assert torch.equal(2 * gradient, _gradients(twice)[name]), name


def test_sampling_with_what_should_be_predicted_leads_back_to_the_sample() -> None:
    """The signs of training are those of the sampler: this is what fails silently elsewhere."""
    latents_CHW = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    one = flow.noised(latents_CHW, Noise("schedule", step_count=1), 3, 0, 0)
    assert one.time == 0.0  # the one level of a schedule of one step: pure noise
    run = Run(text_to_image(one.latents_CHW, (1.0, 0.6, 0.25, 0.0), 0.0, 0.0, 1.0))
    while run.step:
        [forward] = run.step.forwards
        on_the_way = latents_CHW - (1 - forward.time) * one.velocity_CHW
        assert (forward.latents_CHW - on_the_way).abs().max() <= 1e-5
        run.send((one.velocity_CHW,))
    assert run.latents_CHW is not None
    assert (run.latents_CHW - latents_CHW).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("noise", "least", "most"),
    [
        (Noise("uniform"), 0.48, 0.52),
        (Noise("uniform", shift=3.0), 0.66, 0.69),  # E[3u / (1 + 2u)] = 0.676
        (Noise("logit_normal"), 0.48, 0.52),
        (Noise("schedule", shift=3.0, step_count=8), 0.71, 0.75),
    ],
)
def test_sigmas_are_drawn_as_asked(noise: Noise, least: float, most: float) -> None:
    latents_CHW = torch.zeros(1, 1, 1)
    sigmas = [1 - flow.noised(latents_CHW, noise, 0, step, 0).time for step in range(4000)]
    assert least <= sum(sigmas) / len(sigmas) <= most
    assert min(sigmas) > 0
    assert max(sigmas) <= 1
    if noise.distribution == "schedule":
        assert len(set(sigmas)) == noise.step_count


def test_a_gradient_that_is_no_number_moves_nothing(model: ZImageTransformer) -> None:
    training = Training(model, "sdpa", PLAN)
    before = {name: tensor.clone() for name, tensor in training.state().items()}
    broken = replace(_batch(model)[0], latents_CHW=torch.full((16, 8, 8), float("nan")))
    training.learn([broken], 0)
    outcome = training.take_step()
    assert not outcome.is_taken
    assert training.step == 1
    for name, tensor in training.state().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("spoilt", ["missing", "other", "larger"])
def test_a_state_of_another_plan_is_refused(model: ZImageTransformer, spoilt: str) -> None:
    state = Training(model, "sdpa", PLAN).state()
    name = f"weights/layers.0.attention.to_q.{lora.DOWN}"
    if spoilt == "missing":
        del state[name]
    elif spoilt == "other":
        state["weights/layers.9.attention.to_q.lora_A.weight"] = state[name]
    else:
        state[name] = torch.zeros(5, 5)
    with pytest.raises(InvalidRequest, match=r"open.state: .*to_q"):
        Training(model, "sdpa", PLAN, state, 1)
