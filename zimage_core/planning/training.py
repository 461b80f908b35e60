"""What a training does, every setting decided, and what follows from it without a device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from zimage_core.digests import Named
from zimage_core.planning.flops import DitShape
from zimage_core.planning.linears import linears

USUAL_STACK = "layers"
USUAL_RANK = 16
LARGEST_RANK = 1024
USUAL_PEAKS = {"adafactor": 1e-2, "prodigy": 1.0}
"""Of learning rates, with optimisers that take them as relative to something."""


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Linears whose change has one rank."""

    stack: str
    first_block: int
    end_block: int
    """Behind the last."""
    linears: tuple[str, ...]
    """By their names in a block."""
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Target:
    """A linear that is changed, and how."""

    out_width: int
    in_width: int
    rank: int
    alpha: float

    @property
    def strength(self) -> float:
        """By how much the product of its halves counts."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How gradients become steps."""

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    largest_gradient_norm: float = 1.0
    """Longer gradients are shortened to it; 0 for no bound."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """How far steps go, from the first to the last."""

    peak: float = 1e-4
    course: str = "constant"
    """Or cosine, or one_cycle."""
    warmup_step_count: int = 0
    least: float = 0.0

    def at(self, step: int, step_count: int) -> float:
        """For a step, counted from 0, of so many."""
        if self.course == "one_cycle":
            rise = max(1, round(_ONE_CYCLE_RISE * step_count))
            if step < rise:
                return self.least + (self.peak - self.least) * (step + 1) / rise
            return self._falling(step - rise, step_count - rise)
        if step < self.warmup_step_count:
            return self.peak * (step + 1) / self.warmup_step_count
        if self.course == "cosine":
            return self._falling(step - self.warmup_step_count, step_count - self.warmup_step_count)
        return self.peak

    def _falling(self, step: int, step_count: int) -> float:
        share = (1 + math.cos(math.pi * min(1.0, step / max(1, step_count)))) / 2
        return self.least + (self.peak - self.least) * share


_ONE_CYCLE_RISE = 0.3
"""Of all steps."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How noisy what is learnt from is: the distribution of sigma, the share of noise."""

    distribution: str = "uniform"
    """Or logit_normal, or schedule: the levels of a picture of so many steps, equally often."""
    shift: float = 1.0
    """Moves it towards noise, as that of a schedule does; 1 leaves it."""
    mean: float = 0.0
    deviation: float = 1.0
    """Of a logit-normal one."""
    step_count: int = 50


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A training: what decides every bit of it beside the samples and the machine."""

    seed: int
    step_count: int
    lora: tuple[LoraGroup, ...] = ()
    full: bool = False
    """Whether the model's own weights are learnt, in the place of an adapter."""
    noise: Noise = Noise()
    optimizer: Optimizer = Optimizer()
    learning_rate: LearningRate = LearningRate()
    samples_at_once: int = 1
    """How many samples of a batch are computed together; changes time and memory. 0 until that is
    decided."""
    recompute: str = "blocks"
    """What is computed again for the gradient rather than kept for it, or nothing; empty until that
    is decided."""
    recompute_interval: int = 1
    """In every so-manieth block."""
    compiled: bool = False
    """Whether blocks run as compiled code: other last bits."""
    average_decay: float = 0.0
    """Of the moving average of the weights, which is what is used then; 0 for none."""
    beside: Named | None = None
    """The file of an adapter that is active while training, and absent afterwards."""
    beside_scale: float = 1.0
    save_dtype: str = "bfloat16"
    """The element type of the file of what was learnt."""


def targets(groups: tuple[LoraGroup, ...], shape: DitShape) -> dict[str, Target]:
    """The linears of a model that a training changes, in the model's order; where groups meet, the
    later one counts. Raises ValueError for one that the model has not."""
    known = linears(shape)
    found = {}
    for group in groups:
        for name in _named(group):
            if name not in known:
                raise ValueError(name)
            found[name] = Target(*known[name], group.rank, group.alpha)
    return {name: found[name] for name in known if name in found}


def parameter_count(changed: dict[str, Target]) -> int:
    """How many numbers are learnt."""
    return sum(one.rank * (one.in_width + one.out_width) for one in changed.values())


def _named(group: LoraGroup) -> Iterator[str]:
    for block in range(group.first_block, group.end_block):
        yield from (f"{group.stack}.{block}.{linear}" for linear in group.linears)
