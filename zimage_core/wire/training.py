"""Plans of trainings to and from their messages: what was left out is decided here, and what cannot
be is refused by its name."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zimage_core import digests
from zimage_core.digests import Named
from zimage_core.errors import InvalidRequest
from zimage_core.planning.flops import DitShape
from zimage_core.planning.limits import padded
from zimage_core.planning.linears import block_counts, block_linears, modulation_linears
from zimage_core.planning.training import (
    LARGEST_RANK,
    USUAL_PEAKS,
    USUAL_RANK,
    USUAL_STACK,
    LearningRate,
    LoraGroup,
    Noise,
    Optimizer,
    TrainingPlan,
)
from zimage_core.planning.training_memory import Rows
from zimage_core.wire.names import (
    COURSES,
    DISTRIBUTIONS,
    OPTIMIZERS,
    RECOMPUTES,
    SAVE_DTYPES,
    name_of,
)
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.types.v1 import types_pb2

_Plan = training_pb2.TrainingPlan
_MOST_STEPS = 10_000_000
_MOST_AT_ONCE = 256
_MOST_INTERVAL = 64
_MOST_GROUPS = 64
_MOST_TOKENS = 1 << 20


def plan(message: training_pb2.TrainingPlan, shape: DitShape, field: str) -> TrainingPlan:
    """The plan for a model of this shape; raises InvalidRequest with the path of what is wrong,
    which begins with that of the message."""
    given = _Section(message, field)
    for other in ("lora", "beside"):
        if message.full and message.HasField(other):
            raise given.refusal(other, "one beside full", "either of both")
    optimizer, recompute = _optimizer(given.within("optimizer")), _recompute(message)
    beside, file = given.within("beside"), None
    if message.HasField("beside"):
        digest = message.beside.digest
        digests.check(digest.sha256, f"{beside.field}.digest.sha256")
        file = Named(digest.sha256, digest.size_bytes)
    return TrainingPlan(
        seed=message.seed,
        step_count=given.count("step_count", None, 1, _MOST_STEPS),
        lora=() if message.full else _lora(given.within("lora"), shape),
        full=message.full,
        noise=_noise(given.within("noise")),
        optimizer=optimizer,
        learning_rate=_learning_rate(given.within("learning_rate"), optimizer),
        samples_at_once=_at_once(given),
        recompute=recompute,
        recompute_interval=_interval(given, recompute),
        compiled=message.compiled,
        average_decay=given.number("average_decay", 0.0, _BELOW_1),
        beside=file,
        beside_scale=beside.number("scale", 1.0, _ANY),
        save_dtype=given.within("save").name("dtype", SAVE_DTYPES),
    )


def message(decided: TrainingPlan) -> training_pb2.TrainingPlan:
    """The message that says all of a plan."""
    noise, optimizer, rate = decided.noise, decided.optimizer, decided.learning_rate
    beside = None
    if file := decided.beside:
        digest = types_pb2.Digest(sha256=file.sha256, size_bytes=file.size_bytes)
        beside = training_pb2.TrainingAdapter(digest=digest, scale=decided.beside_scale)
    lora = training_pb2.LoraPlan(
        groups=[training_pb2.LoraGroup(**asdict(group)) for group in decided.lora]
    )
    return training_pb2.TrainingPlan(
        beside=beside,
        full=decided.full,
        seed=decided.seed,
        step_count=decided.step_count,
        lora=None if decided.full else lora,
        noise=training_pb2.NoisePlan(
            **asdict(noise) | {"distribution": DISTRIBUTIONS[noise.distribution]}
        ),
        optimizer=training_pb2.OptimizerPlan(
            **asdict(optimizer) | {"name": OPTIMIZERS[optimizer.name]}
        ),
        learning_rate=training_pb2.LearningRatePlan(
            **asdict(rate) | {"course": COURSES[rate.course]}
        ),
        samples_at_once=decided.samples_at_once or None,
        recompute=RECOMPUTES.get(decided.recompute, _Plan.RECOMPUTE_UNSPECIFIED),
        recompute_interval=decided.recompute_interval,
        compiled=decided.compiled,
        average_decay=decided.average_decay,
        save=training_pb2.SavePlan(dtype=SAVE_DTYPES[decided.save_dtype]),
    )


def _at_once(given: "_Section") -> int:
    is_given = given.message.HasField("samples_at_once")
    return given.count("samples_at_once", None, 1, _MOST_AT_ONCE) if is_given else 0


def _recompute(message: training_pb2.TrainingPlan) -> str:
    """Compiled code computes what costs little again by itself."""
    name = name_of(message.recompute, RECOMPUTES)
    return "elementwise" if message.compiled and name == "nothing" else name


def _interval(given: "_Section", recompute: str) -> int:
    interval = given.count("recompute_interval", 1, 1, _MOST_INTERVAL)
    is_for_all = recompute in ("", "nothing")
    is_for_all |= given.message.compiled and recompute == "elementwise"
    if interval > 1 and is_for_all:
        raise given.refusal("recompute_interval", interval, "1 unless recompute says of what")
    return interval


def sizes(messages: Sequence[training_pb2.SampleSize], field: str) -> tuple[Rows, ...]:
    """What samples take, as a model packs them; raises InvalidRequest for what no sample is."""
    if len(messages) > _MOST_AT_ONCE:
        given, allowed = f"{len(messages)} samples", f"{_MOST_AT_ONCE} at most"
        raise InvalidRequest.given(field, given, allowed, "TRAINING_PLAN")
    found = []
    for index, one in enumerate(messages):
        section = _Section(one, f"{field}[{index}]")
        image = section.count("image_tokens", None, 1, _MOST_TOKENS)
        caption = section.count("caption_tokens", None, 1, _MOST_TOKENS)
        found.append(Rows(padded(image), padded(caption)))
    return tuple(found)


def _lora(given: "_Section", shape: DitShape) -> tuple[LoraGroup, ...]:
    groups = given.message.groups or [training_pb2.LoraGroup()]
    if len(groups) > _MOST_GROUPS:
        raise given.refusal("groups", f"{len(groups)} groups", f"{_MOST_GROUPS} at most")
    return tuple(
        _group(_Section(group, f"{given.field}.groups[{index}]"), shape)
        for index, group in enumerate(groups)
    )


def _group(given: "_Section", shape: DitShape) -> LoraGroup:
    stack = given.message.stack or USUAL_STACK
    counts = block_counts(shape)
    given.one_of("stack", stack, counts)
    usual = list(block_linears(shape))
    known = usual + list(modulation_linears(shape, stack))
    named = list(given.message.linears) or usual
    for index, linear in enumerate(named):
        given.one_of(f"linears[{index}]", linear, known)
    first = given.count("first_block", 0, 0, counts[stack] - 1)
    rank = given.count("rank", USUAL_RANK, 1, LARGEST_RANK)
    return LoraGroup(
        stack=stack,
        first_block=first,
        end_block=given.count("end_block", counts[stack], first + 1, counts[stack]),
        linears=tuple(dict.fromkeys(named)),
        rank=rank,
        alpha=given.number("alpha", float(rank), _ABOVE_0),
    )


def _noise(given: "_Section") -> Noise:
    usual = Noise()
    return Noise(
        distribution=given.name("distribution", DISTRIBUTIONS),
        shift=given.number("shift", usual.shift, _ABOVE_0),
        mean=given.number("mean", usual.mean, _ANY),
        deviation=given.number("deviation", usual.deviation, _FROM_0),
        step_count=given.count("step_count", usual.step_count, 1, 1000),
    )


def _optimizer(given: "_Section") -> Optimizer:
    usual, name = Optimizer(), given.name("name", OPTIMIZERS)
    if name == "adafactor":
        for other in ("beta1", "beta2", "epsilon"):
            value = getattr(given.message, other)
            if given.message.HasField(other) and value != getattr(usual, other):
                raise given.refusal(other, value, "nothing with adafactor")
    return Optimizer(
        name=name,
        beta1=given.number("beta1", usual.beta1, _BELOW_1),
        beta2=given.number("beta2", usual.beta2, _BELOW_1),
        epsilon=given.number("epsilon", usual.epsilon, _ABOVE_0),
        weight_decay=given.number("weight_decay", usual.weight_decay, _FROM_0),
        largest_gradient_norm=given.number(
            "largest_gradient_norm", usual.largest_gradient_norm, _FROM_0
        ),
    )


def _learning_rate(given: "_Section", optimizer: Optimizer) -> LearningRate:
    usual = LearningRate()
    return LearningRate(
        peak=given.number("peak", USUAL_PEAKS.get(optimizer.name, usual.peak), _RATE),
        course=given.name("course", COURSES),
        warmup_step_count=given.count("warmup_step_count", usual.warmup_step_count, 0, _MOST_STEPS),
        least=given.number("least", usual.least, _FROM_0),
    )


@dataclass(frozen=True, slots=True)
class _Range:
    """From the least to the most; either may be left out."""

    allowed: str
    least: float = -math.inf
    most: float = math.inf
    is_open: bool = False
    """Whether the least itself is too little."""

    def __contains__(self, value: float) -> bool:
        is_enough = value > self.least if self.is_open else value >= self.least
        return math.isfinite(value) and is_enough and value <= self.most


_ANY = _Range("a finite number")
_FROM_0 = _Range("0 or more", 0.0)
_ABOVE_0 = _Range("more than 0", 0.0, is_open=True)
_BELOW_1 = _Range("0 or more, below 1", 0.0, math.nextafter(1.0, 0.0))
_RATE = _Range("more than 0, 1 at most", 0.0, 1.0, is_open=True)


@dataclass(frozen=True, slots=True)
class _Section:
    """A message and its path."""

    message: Any
    field: str

    def within(self, name: str) -> "_Section":
        """A message in it."""
        return _Section(getattr(self.message, name), f"{self.field}.{name}")

    def count(self, name: str, usual: int | None, least: int, most: int) -> int:
        """A whole number; `usual` where it was left out."""
        is_given = usual is None or self.message.HasField(name)
        value = int(getattr(self.message, name)) if is_given else usual
        assert value is not None
        if not least <= value <= most:
            raise self.refusal(name, value, f"{least} to {most}")
        return value

    def number(self, name: str, usual: float, within: _Range) -> float:
        """A number; `usual` where it was left out."""
        value = float(getattr(self.message, name)) if self.message.HasField(name) else usual
        if value not in within:
            raise self.refusal(name, value, within.allowed)
        return value

    def name(self, name: str, names: Mapping[str, int]) -> str:
        """A value of an enumeration by its name; the first where it was left out."""
        return name_of(getattr(self.message, name), names) or next(iter(names))

    def one_of(self, name: str, value: str, known: Any) -> None:
        """Raises InvalidRequest for what is not known."""
        if value not in known:
            nearest = difflib.get_close_matches(value, known, n=1)
            raise self.refusal(name, value, ", ".join(known), *nearest)

    def refusal(self, name: str, given: object, allowed: str, nearest: str = "") -> InvalidRequest:
        """Of a field."""
        return InvalidRequest.given(
            f"{self.field}.{name}", given, allowed, "TRAINING_PLAN", nearest
        )
