"""A training under way: batch after batch to a gradient, a gradient to a step.

Everything that a step depends on is in the plan, in the state and in the batch: a training that
goes on from its state computes what it would have computed without the break.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_service.model.adapters import Uses
from dit_service.model.blocks import run_block
from dit_service.model.likeness import check_likeness
from dit_service.model.transformer import Call, Run, Sample, ZImageTransformer
from dit_service.training import flow
from dit_service.training.flow import Noised
from dit_service.training.lora import Lora, halves
from dit_service.training.optimisers import Stepper, is_known
from dit_service.training.recompute import caller
from dit_service.training.whole import Whole
from zimage_core.errors import InvalidRequest
from zimage_core.planning.training import TrainingPlan, targets

_WEIGHTS, _AVERAGE, _OPTIMIZER = "weights/", "average/", "optimizer/"
"""Where the tensors of a state belong, by the beginnings of their names."""
_SMALL = ([(8, 8, 20)], [(8, 8, 20), (8, 8, 21)], [(8, 8, 20), (16, 12, 40)])
"""Height and width of latents, tokens of a caption: one sample, two alike at once, and two that are
not."""
_LOOKED_AT = 1 << 12
"""Of each weight's gradient: whole models have more than there is room for twice."""
LEVELS = 4
"""Of noise, at which examples are looked at that are not learnt."""


@dataclass(frozen=True, eq=False)
class Example:
    """A sample of a batch."""

    latents_CHW: Tensor
    features_LF: Tensor
    """Its caption's embedding."""
    share: float
    """By how much it counts in the batch's loss."""
    mask_HW: Tensor | None = None
    """Which of its places are learnt, by their weights; all alike without."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step."""

    loss: float
    gradient_norm: float
    """Before it was bounded."""
    learning_rate: float
    is_taken: bool
    """False where the gradient was no finite number: nothing has changed then."""


class Learnt(Protocol):
    """What is learnt: an adapter, or the model itself."""

    weights: dict[str, Tensor]
    """In float32, with gradients."""

    def uses(self, weights: Mapping[str, Tensor]) -> Uses:
        """The adapters with which the model computes by such weights."""

    def has_moved(self) -> None:
        """Hears that the weights are others."""

    def file_tensors(
        self, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Such weights as the file has them that programs read."""

    def close(self) -> None:
        """Leaves the model to others."""


Share = Callable[[float, Sequence[Tensor]], float]
"""Gives the loss of all who learn the same at the same time, each from its own part of a batch, for
the loss of a part; gradients are those of all parts afterwards."""


def alone(loss: float, _weights: Sequence[Tensor]) -> float:
    """There is but one part."""
    return loss


class Training:
    """One, with the model that it shares with whoever samples."""

    def __init__(
        self,
        model: ZImageTransformer,
        backend: str,
        plan: TrainingPlan,
        state: Mapping[str, Tensor] | None = None,
        step: int = 0,
        beside: Uses = (),
    ) -> None:
        """Begins, or goes on from the state behind so many steps. What is beside is active while
        training, and not part of what is learnt."""
        self._beside = beside
        self._model = model
        self._backend = backend
        self._plan = plan
        self.step = step
        """How many are behind it."""
        state = state or {}
        self._learnt = _learnt(model, plan, state)
        self.weights = self._learnt.weights
        self._average: dict[str, Tensor] = {}
        try:
            if plan.average_decay:
                average = _within(state, _AVERAGE) or self.weights
                self._average = {
                    name: one.detach().to(model.device, copy=True) for name, one in average.items()
                }
            self._stepper = Stepper(
                plan.optimizer, self.weights, _within(state, _OPTIMIZER), is_sparing=plan.full
            )
            self._call = caller(plan, model)
        except BaseException:
            self.close()
            raise
        self._loss = 0.0
        """Of the batch, as far as it is computed."""

    def learn(self, examples: Sequence[Example], first: int) -> None:
        """Adds to the gradient what some examples of the next batch say, the first of which has
        that number in it."""
        noised = [
            flow.noised(example.latents_CHW, self._plan.noise, self._plan.seed, self.step, number)
            for number, example in enumerate(examples, first)
        ]
        self._loss += float(self.go_back(noised, examples))

    @torch.enable_grad()
    def go_back(self, noised: Sequence[Noised], examples: Sequence[Example]) -> Tensor:
        """Forwards, and back along the gradient, for which nobody waits; their part of the loss."""
        uses = (*self._learnt.uses(self.weights), *self._beside)
        losses = self._losses(noised, examples, uses, self._call)
        loss = torch.stack(
            [example.share * one for example, one in zip(examples, losses, strict=True)]
        ).sum()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def loss_of(self, example: Example, place: int) -> float:
        """What is lost on an example that is not learnt, with what checkpoints hold: at fixed
        noise, evenly from little to much."""
        noised = [
            flow.placed(
                example.latents_CHW, self._plan.noise, (level + 0.5) / LEVELS, self._plan.seed,
                place, level,
            )
            for level in range(LEVELS)
        ]  # fmt: skip
        uses = self._learnt.uses(self._average or self.weights)
        losses = [float(self._losses([one], [example], uses, _computed)[0]) for one in noised]
        return sum(losses) / LEVELS

    def _losses(
        self, noised: Sequence[Noised], examples: Sequence[Example], uses: Uses, call: Call
    ) -> list[Tensor]:
        """Of each, in one forward."""
        times_N = torch.tensor([one.time for one in noised], device=self._model.device)
        captions = self._model.encode_captions(
            [example.features_LF for example in examples], self._backend, uses, call
        )
        samples = [
            Sample(one.latents_CHW, caption, moment, uses)
            for one, caption, moment in zip(
                noised, captions, self._model.modulate(times_N, uses), strict=True
            )
        ]
        shapes = [self._model.shape_of(one.latents_CHW, one.caption) for one in samples]
        layout = self._model.layout(shapes)
        velocities = self._model(samples, layout, self._backend, call)
        return [
            flow.loss(velocity, one.velocity_CHW, example.mask_HW)
            for velocity, one, example in zip(velocities, noised, examples, strict=True)
        ]

    def try_out(self) -> None:
        """Has code made that is made while it runs, by small gradients; raises what a compiler
        raises, and ArithmeticError where its code computes something else."""
        check_likeness(*(self._small_gradient(call) for call in (self._call, _computed)))

    def _small_gradient(self, call: Call) -> Tensor:
        """Of all kinds of batches, one after the other."""
        usual, self._call = self._call, call
        try:
            for sizes in _SMALL:
                examples = [self._small(*size) for size in sizes]
                noised = [
                    flow.noised(one.latents_CHW, self._plan.noise, 0, 0, number)
                    for number, one in enumerate(examples)
                ]
                self.go_back(noised, examples)
            gradients = [one.grad for one in self.weights.values() if one.grad is not None]
            return torch.cat([one.flatten()[:_LOOKED_AT] for one in gradients])
        finally:
            self._call = usual
            for weight in self.weights.values():
                weight.grad = None

    def _small(self, height: int, width: int, length: int) -> Example:
        drawn, config = torch.Generator().manual_seed(length), self._model.config
        latents_CHW = torch.randn(config.in_channels, height, width, generator=drawn)
        features_LF = torch.randn(length, config.cap_feat_dim, generator=drawn)
        device, dtype = self._model.device, self._model.dtype
        return Example(latents_CHW.to(device), features_LF.to(device, dtype), 1.0)

    def take_step(self, share: Share = alone) -> Outcome:
        """Goes where the gradient of all parts of the batch says."""
        loss = share(self._loss, list(self.weights.values()))
        rate = self._plan.learning_rate.at(self.step, self._plan.step_count)
        norm = self._stepper.step(rate)
        is_taken = norm is not None
        if is_taken:
            self._learnt.has_moved()
            for name, average in self._average.items():
                average.lerp_(self.weights[name].detach(), 1 - self._plan.average_decay)
        outcome = Outcome(loss, float("nan") if norm is None else norm, rate, is_taken)
        self._loss = 0.0
        self.step += 1
        return outcome

    def file_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """What was learnt, as the tensors of the file that programs read."""
        learnt = {name: one.detach() for name, one in (self._average or self.weights).items()}
        return self._learnt.file_tensors(learnt, dtype)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on beside the plan; the next step changes it."""
        parts = {
            _WEIGHTS: self.weights,
            _AVERAGE: self._average,
            _OPTIMIZER: self._stepper.state(),
        }
        return {
            f"{part}{name}": tensor.detach()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def close(self) -> None:
        """It is over."""
        self._learnt.close()


def _computed(_run: Run, *given: Any) -> Tensor:
    """As it is, whatever pictures are drawn with."""
    return run_block(*given)


def _learnt(model: ZImageTransformer, plan: TrainingPlan, state: Mapping[str, Tensor]) -> Learnt:
    """As it is without a state, or with the weights of one; raises InvalidRequest for a state of
    another training."""
    if plan.full:
        wanted = {name: one.shape for name, one in model.named_parameters()}
        _check(state, wanted, plan.optimizer.name)
        return Whole(model, _within(state, _WEIGHTS))
    changed = targets(plan.lora, model.config)
    _check(state, halves(changed), plan.optimizer.name)
    return Lora(changed, model, plan.seed, _within(state, _WEIGHTS))


def _check(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], optimiser: str
) -> None:
    """Raises InvalidRequest for a state that is not of such weights."""
    for name, tensor in state.items():
        part, _, rest = name.partition("/")
        if part == "optimizer":
            is_right = is_known(rest, tensor, shapes, optimiser)
        else:
            is_right = rest in shapes and tuple(tensor.shape) == tuple(shapes[rest])
        if not is_right:
            given = f"one with {name[:200]}"
            raise InvalidRequest.given("open.state", given, "a state of its plan", "TRAINING_STATE")
    missing = shapes.keys() - _within(state, _WEIGHTS).keys() if state else ()
    if missing:
        given = f"one without {min(missing)}"
        raise InvalidRequest.given("open.state", given, "a state of its plan", "TRAINING_STATE")


def _within(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)
    }
