"""Plans of trainings on the wire: what is left out is decided, and what cannot be is refused."""

import math
from itertools import pairwise

import pytest

from zimage_core.errors import InvalidRequest
from zimage_core.planning.flops import DitShape
from zimage_core.planning.linears import linears
from zimage_core.planning.training import LearningRate, parameter_count, targets
from zimage_core.wire import training
from zimage_rpc.dit.v1 import training_pb2

PUBLISHED = DitShape(
    dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30,
    in_channels=16, cap_feat_dim=2560, patch_size=2,
)  # fmt: skip
_Plan = training_pb2.TrainingPlan
_Group = training_pb2.LoraGroup
_Noise = training_pb2.NoisePlan
_Optimizer = training_pb2.OptimizerPlan
_Rate = training_pb2.LearningRatePlan


def test_what_is_left_out_is_decided() -> None:
    plan = training.plan(_Plan(step_count=10), PUBLISHED, "plan")
    changed = targets(plan.lora, PUBLISHED)
    assert len(changed) == 30 * 7
    assert {one.rank for one in changed.values()} == {16}
    assert plan.learning_rate.at(5, 10) == 1e-4
    assert (plan.recompute, plan.samples_at_once) == ("", 0)  # decided where it is computed


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        (_Optimizer.NAME_ADAMW, 1e-4),
        (_Optimizer.NAME_ADAMW_8BIT, 1e-4),
        (_Optimizer.NAME_ADAFACTOR, 1e-2),
        (_Optimizer.NAME_PRODIGY, 1.0),
    ],
)
def test_each_optimiser_has_a_usual_rate(name: _Optimizer.Name, peak: float) -> None:
    given = _Plan(step_count=10, optimizer=_Optimizer(name=name))
    plan = training.plan(given, PUBLISHED, "plan")
    assert plan.learning_rate.peak == peak
    assert training.plan(training.message(plan), PUBLISHED, "plan") == plan


def test_a_plan_is_the_same_after_the_way_over_the_wire() -> None:
    given = _Plan(
        seed=-3,
        step_count=100,
        lora=training_pb2.LoraPlan(
            groups=[
                _Group(stack="context_refiner", rank=2, linears=["attention.to_v"]),
                _Group(first_block=3, end_block=9, alpha=1.5, linears=["adaLN_modulation.0"]),
            ]
        ),
        noise=_Noise(distribution=_Noise.DISTRIBUTION_SCHEDULE, shift=3.0, step_count=8),
        optimizer=_Optimizer(beta2=0.99, largest_gradient_norm=0.0),
        learning_rate=_Rate(course=_Rate.COURSE_ONE_CYCLE, peak=1e-3),
        samples_at_once=4,
        recompute=_Plan.RECOMPUTE_ELEMENTWISE,
        recompute_interval=3,
        average_decay=0.99,
    )
    plan = training.plan(given, PUBLISHED, "plan")
    message = training.message(plan)
    assert training.plan(message, PUBLISHED, "plan") == plan
    assert training.message(training.plan(message, PUBLISHED, "plan")) == message
    assert plan.optimizer.largest_gradient_norm == 0.0  # zero is not unset
    assert plan.lora[0].end_block == 2


@pytest.mark.parametrize(
    ("wrong", "field", "allowed"),
    [
        (_Plan(), "plan.step_count", "1 to"),
        (_Plan(step_count=1, average_decay=1.0), "plan.average_decay", "below 1"),
        (_Plan(step_count=1, learning_rate=_Rate(peak=math.nan)), "plan.learning_rate.peak", "0"),
        (_Plan(step_count=1, optimizer=_Optimizer(beta1=1.0)), "plan.optimizer.beta1", "below 1"),
        (_Plan(step_count=1, recompute_interval=2), "plan.recompute_interval", "1 unless"),
        (
            _Plan(
                step_count=1,
                recompute=_Plan.RECOMPUTE_NOTHING,
                compiled=True,
                recompute_interval=2,
            ),
            "plan.recompute_interval",
            "1 unless",
        ),
        (_Plan(step_count=1, noise=_Noise(shift=0.0)), "plan.noise.shift", "more than 0"),
        (
            _Plan(
                step_count=1,
                optimizer=_Optimizer(name=_Optimizer.NAME_ADAFACTOR, beta2=0.99),
            ),
            "plan.optimizer.beta2",
            "nothing with adafactor",
        ),
        (
            _Plan(step_count=1, lora=training_pb2.LoraPlan(groups=[_Group(rank=0)])),
            "plan.lora.groups[0].rank",
            "1 to 1024",
        ),
        (
            _Plan(
                step_count=1, lora=training_pb2.LoraPlan(groups=[_Group(), _Group(stack="main")])
            ),
            "plan.lora.groups[1].stack",
            "noise_refiner, context_refiner, layers",
        ),
        (
            _Plan(
                step_count=1,
                lora=training_pb2.LoraPlan(groups=[_Group(linears=["attention.to_qq"])]),
            ),
            "plan.lora.groups[0].linears[0]",
            "attention.to_q",
        ),
        (
            _Plan(
                step_count=1,
                lora=training_pb2.LoraPlan(groups=[_Group(first_block=4, end_block=4)]),
            ),
            "plan.lora.groups[0].end_block",
            "5 to 30",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(
    wrong: training_pb2.TrainingPlan, field: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        training.plan(wrong, PUBLISHED, "plan")
    assert refusal.value.field == field
    assert allowed in refusal.value.fields["allowed"]


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ([_Group(rank=32)], 70_041_600),
        ([_Group(rank=32, linears=[f"attention.to_{one}" for one in ("q", "k", "v", "out.0")])],
         29_491_200),
        ([_Group(rank=32, stack=stack, linears=[]) for stack in ("noise_refiner",)], 4_669_440),
    ],
)  # fmt: skip
def test_the_numbers_that_are_learnt_are_counted(groups: list[_Group], count: int) -> None:
    plan = _Plan(step_count=1, lora=training_pb2.LoraPlan(groups=groups))
    assert parameter_count(targets(training.plan(plan, PUBLISHED, "plan").lora, PUBLISHED)) == count


def test_where_groups_meet_the_later_counts() -> None:
    groups = [
        _Group(rank=4),
        _Group(first_block=1, end_block=2, linears=["attention.to_q"], rank=8),
    ]
    plan = training.plan(
        _Plan(step_count=1, lora=training_pb2.LoraPlan(groups=groups)), PUBLISHED, "plan"
    )
    changed = targets(plan.lora, PUBLISHED)
    assert changed["layers.1.attention.to_q"].rank == 8
    assert changed["layers.1.attention.to_k"].rank == 4
    assert list(changed) == [name for name in linears(PUBLISHED) if name in changed]


def test_the_learning_rate_goes_its_course() -> None:
    cosine = LearningRate(1.0, "cosine", warmup_step_count=4, least=0.1)
    rates = [cosine.at(step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert all(one > other for one, other in pairwise(rates[4:]))
    assert rates[-1] > 0.1
    cycle = LearningRate(1.0, "one_cycle")
    assert max(range(100), key=lambda step: cycle.at(step, 100)) in (29, 30)
