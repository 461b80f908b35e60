"""How much memory a training takes, and which way to compute it is the fastest that fits.

The coefficients are counts of tensors that a block keeps for its gradient, in rows as wide as the
model; live storages of full-size steps agree with them within a tenth (a test).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from zimage_core.planning.flops import DitShape, dit_parameter_count
from zimage_core.planning.linears import block_counts
from zimage_core.planning.memory import FULL, weight_bytes
from zimage_core.planning.training import LoraGroup, TrainingPlan, parameter_count, targets

NOTHING, ELEMENTWISE, BLOCKS, OFFLOADED = "nothing", "elementwise", "blocks", "offloaded"
"""What is computed again: nothing, all but products of matrices and attention, or all of a block,
whose input may wait in the host's memory. Which products are to be kept is found out operation by
operation, which takes the host some milliseconds a block; compiled code knows."""

LEAST_FORWARDS = 3
"""What a sample costs: itself, and about twice that for its gradient."""
MOST_AT_ONCE = 64
"""Samples of a batch whose size is left open."""

_LEARNT_BYTES, _GRADIENT_BYTES = 4, 4
"""Of a number that is learnt, in float32."""
_KEPT_BYTES = {"adamw": 8, "adafactor": 0.2, "prodigy": 16, "adamw_8bit": 2.1}
"""What an optimiser keeps of it; rows and columns alone are few, in low-rank weights, too."""
_KEPT = 24.4
"""Of a block, whatever is learnt in it."""
_INPUTS = {
    ("attention.to_q", "attention.to_k", "attention.to_v"): 1.0,
    ("feed_forward.w1", "feed_forward.w3"): 1.0,
    ("feed_forward.w2",): 8 / 3,
}
"""What linears keep besides, once where any of them learns: what went in."""
_WIDENED_BYTES = 8
"""Of a number of a narrow linear on its way to that type: two steps of it in float32."""
_HELD = {ELEMENTWISE: 37 / 3, BLOCKS: 1.0, OFFLOADED: 1.0}
"""What blocks hold that are computed again: what goes in, and what products give unless these are
computed again, too."""
WAYS = (NOTHING, ELEMENTWISE, BLOCKS, OFFLOADED)
_OF_SEVERAL = 4.0
"""The norms' weights by the row, where samples have their own."""
_ON_THE_WAY_BACK = 11.0
"""Gradients of a block that is computed again."""


@dataclass(frozen=True, slots=True)
class TrainingBytes:
    """What a training takes."""

    weights: float
    """Of the frozen model."""
    learnt: float
    """What is learnt, its average, and what the optimiser keeps."""
    step: float
    """What as many samples as are computed at once take on the way, and the gradient."""

    @property
    def all(self) -> float:
        """At the peak."""
        return self.weights + self.learnt + self.step


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model."""

    element_bytes: int
    """Of a number in the type that it computes in."""
    form: str = FULL
    """That its large linears are in."""
    is_apart: bool = True
    """Whether the device's memory is not the host's, in which more may wait."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Of a sample, as the model packs it."""

    image: int
    caption: int


def training_bytes(
    shape: DitShape,
    plan: TrainingPlan,
    samples: Sequence[Rows],
    base: Base,
    *,
    accumulates: bool = False,
) -> TrainingBytes:
    """With these samples at once; `accumulates` where a batch has more of them."""
    count, element_bytes = learnt_count(shape, plan), base.element_bytes
    is_narrower = element_bytes < _LEARNT_BYTES
    copies = 0 if plan.full else count * element_bytes
    is_apart = is_narrower or not plan.full
    of_each = _LEARNT_BYTES * (is_apart + (plan.average_decay > 0))
    gradients = _GRADIENT_BYTES * count
    way = _way(shape, plan, samples, base) * shape.dim * element_bytes
    way = way + gradients if accumulates else max(way, gradients)
    return TrainingBytes(
        weights=weight_bytes(shape, element_bytes, base.form).all,
        learnt=count * (of_each + _KEPT_BYTES[plan.optimizer.name]),
        step=copies + _widened(shape, base) + way,
    )


def learnt_count(shape: DitShape, plan: TrainingPlan) -> int:
    """How many numbers are learnt."""
    return dit_parameter_count(shape) if plan.full else _adapter_count(plan.lora, shape)


@lru_cache(maxsize=16)  # a search for the best plan asks thousands of times
def _adapter_count(groups: tuple[LoraGroup, ...], shape: DitShape) -> int:
    return parameter_count(targets(groups, shape))


def _widened(shape: DitShape, base: Base) -> float:
    """Of the largest linear, while it is used: in float32 and as it is computed with."""
    is_narrow = base.form != FULL
    return is_narrow * shape.dim * shape.ffn_dim * (_WIDENED_BYTES + base.element_bytes)


def fitting(
    shape: DitShape, plan: TrainingPlan, batch: Sequence[Rows], base: Base, room_bytes: float
) -> TrainingPlan | None:
    """The fastest way to compute such batches in so many bytes, as far as the plan leaves it open;
    None where there is no way."""
    counts = (plan.samples_at_once,) if plan.samples_at_once else range(len(batch), 0, -1)
    for recompute in _ways(plan, base):
        for at_once in counts:
            tried = replace(plan, recompute=recompute, samples_at_once=at_once)
            most = largest(shape, tried, batch, base)
            if most.all <= room_bytes:
                return tried
    return None


def _ways(plan: TrainingPlan, base: Base) -> list[str]:
    """What the plan says, or what it leaves open, the fastest first."""
    if plan.recompute:
        return [plan.recompute]
    cheapest = ELEMENTWISE if plan.compiled else NOTHING
    return [cheapest, BLOCKS, *([OFFLOADED] if base.is_apart else [])]


def best_batch(
    shape: DitShape, plan: TrainingPlan, sample: Rows, base: Base, room_bytes: float
) -> TrainingPlan | None:
    """The plan with as many such samples at once as the fastest way has room for: so many are a
    batch that costs no more for each than one. None where not even one fits."""
    for recompute in _ways(plan, base):
        for count in range(MOST_AT_ONCE, 0, -1):
            tried = replace(plan, recompute=recompute, samples_at_once=count)
            if largest(shape, tried, [sample] * count, base).all <= room_bytes:
                return tried
    return None


def careful(plan: TrainingPlan) -> TrainingPlan:
    """What a plan leaves open in a way that takes little, on every device."""
    at_once, recompute = plan.samples_at_once or 1, plan.recompute or BLOCKS
    return replace(plan, samples_at_once=at_once, recompute=recompute)


def largest(
    shape: DitShape, plan: TrainingPlan, batch: Sequence[Rows], base: Base
) -> TrainingBytes:
    """What the largest piece of a batch takes."""
    at_once = plan.samples_at_once
    pieces = [batch[first : first + at_once] for first in range(0, len(batch), at_once)]
    return max(
        (training_bytes(shape, plan, piece, base, accumulates=len(pieces) > 1) for piece in pieces),
        key=lambda one: one.all,
    )


def forwards(plan: TrainingPlan) -> float:
    """What a sample costs, in forwards, with the products that are computed again."""
    again = plan.recompute in (BLOCKS, OFFLOADED)
    return LEAST_FORWARDS + again / plan.recompute_interval


def _way(shape: DitShape, plan: TrainingPlan, samples: Sequence[Rows], base: Base) -> float:
    """Rows as wide as the model that are kept at the peak."""
    image, caption = sum(one.image for one in samples), sum(one.caption for one in samples)
    rows = {"noise_refiner": image, "context_refiner": caption, "layers": image + caption}
    held = 0.0 if plan.recompute == OFFLOADED and base.is_apart else _HELD.get(plan.recompute)
    kept = inside = 0.0
    for stack, blocks in _blocks_with_gradients(shape, plan).items():
        of_block = _inside(plan, stack) + _OF_SEVERAL * (len(samples) > 1)
        if plan.compiled:  # it does so by itself
            of_block = _HELD[ELEMENTWISE]
        again = [] if held is None else [n for n in blocks if n % plan.recompute_interval == 0]
        kept += rows[stack] * (len(blocks) - len(again)) * of_block
        if held is not None and again:
            kept += rows[stack] * len(again) * held
            inside = max(inside, rows[stack] * (of_block + _ON_THE_WAY_BACK - (held - 1)))
    return kept + inside


def _blocks_with_gradients(shape: DitShape, plan: TrainingPlan) -> dict[str, range]:
    """Of each stack the blocks from the first on that learns: those before take no gradient. What
    comes before the layers reaches all of them."""
    counts = block_counts(shape)
    if plan.full:
        return {stack: range(count) for stack, count in counts.items()}
    first = {
        stack: min((one.first_block for one in plan.lora if one.stack == stack), default=count)
        for stack, count in counts.items()
    }
    if any(first[stack] < count for stack, count in counts.items() if stack != "layers"):
        first["layers"] = 0
    return {stack: range(first[stack], count) for stack, count in counts.items()}


def _inside(plan: TrainingPlan, stack: str) -> float:
    """Of one block."""
    learning = {linear for one in plan.lora if one.stack == stack for linear in one.linears}
    return _KEPT + sum(
        rows for linears, rows in _INPUTS.items() if plan.full or learning & set(linears)
    )
