"""What a training step takes of the device's memory, at full size, by the storages that live in it:
D2."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_service.training.flow import Noised
from dit_service.training.training import Example, Training
from tests.device.full_size import CONFIG, fake_transformer
from tests.device.test_memory import Peak
from zimage_core.planning.flops import dit_parameter_count
from zimage_core.planning.limits import padded
from zimage_core.planning.linears import block_linears
from zimage_core.planning.memory import weight_bytes
from zimage_core.planning.training import (
    LoraGroup,
    Optimizer,
    TrainingPlan,
    parameter_count,
    targets,
)
from zimage_core.planning.training_memory import (
    BLOCKS,
    ELEMENTWISE,
    NOTHING,
    OFFLOADED,
    Base,
    Rows,
    best_batch,
    fitting,
    largest,
    training_bytes,
)

CPU = torch.device("cpu")  # autograd does not run on fake tensors of a device that is not there
LINEARS = tuple(block_linears(CONFIG))
ALL = (LoraGroup("layers", 0, 30, LINEARS, 16, 16.0),)
REFINERS = tuple(
    LoraGroup(stack, 0, 2, LINEARS, 16, 16.0) for stack in ("noise_refiner", "context_refiner")
)
LARGE, SMALL, MIXED = [(128, 128, 128)], [(64, 64, 20)], [(128, 128, 128), (96, 64, 31)]


@pytest.fixture(autouse=True)
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _examples(samples: list[tuple[int, int, int]]) -> list[Example]:
    width = CONFIG.cap_feat_dim
    return [
        Example(torch.empty(16, *size), torch.empty(length, width, dtype=torch.bfloat16), 1.0)
        for *size, length in samples
    ]


def _noised(examples: list[Example]) -> list[Noised]:
    return [
        Noised(torch.empty_like(one.latents_CHW), 0.5, torch.empty_like(one.latents_CHW))
        for one in examples
    ]


PLANS = [
    (LARGE, ALL),
    (LARGE * 4, ALL),
    (SMALL, (replace(ALL[0], rank=128),)),
    (MIXED, (replace(ALL[0], linears=LINEARS[:4]),)),
    (LARGE, (replace(ALL[0], first_block=20),)),
    (LARGE, (*ALL, *REFINERS)),
]


@pytest.mark.parametrize(
    ("samples", "groups", "recompute", "interval"),
    [
        *((*plan, recompute, 1) for plan in PLANS for recompute in (BLOCKS, NOTHING)),
        *((*plan, ELEMENTWISE, 1) for plan in (PLANS[1], PLANS[3], PLANS[5])),
        (*PLANS[0], BLOCKS, 3),
        (*PLANS[4], ELEMENTWISE, 2),
    ],
)
def test_a_training_step_takes_what_is_planned_for_it(
    samples: list[tuple[int, int, int]],
    groups: tuple[LoraGroup, ...],
    recompute: str,
    interval: int,
) -> None:
    plan = TrainingPlan(0, 10, groups, recompute=recompute, recompute_interval=interval)
    transformer = fake_transformer(CPU)
    examples = _examples(samples)
    with Peak() as peak:
        Training(transformer, "sdpa", plan).go_back(_noised(examples), examples)
    rows = [Rows(padded(high * wide // 4), padded(length)) for high, wide, length in samples]
    planned = training_bytes(CONFIG, plan, rows, Base(2))
    moments = 8 * parameter_count(targets(groups, CONFIG))  # come with the first step
    assert peak.bytes == pytest.approx(planned.all - moments, rel=0.1)
    way = peak.bytes - planned.weights - planned.learnt + moments
    assert way == pytest.approx(planned.step, rel=0.15)


@pytest.mark.parametrize(
    ("samples", "recompute", "at_once"),
    [(LARGE * 2, BLOCKS, 1), (SMALL, NOTHING, 1), (MIXED, BLOCKS, 2)],
)
def test_a_full_step_takes_what_is_planned_for_it(
    samples: list[tuple[int, int, int]], recompute: str, at_once: int
) -> None:
    plan = TrainingPlan(0, 10, full=True, recompute=recompute, samples_at_once=at_once)
    transformer = fake_transformer(CPU)
    examples = _examples(samples)
    with Peak() as peak:
        training = Training(transformer, "sdpa", plan)
        for first in range(0, len(examples), at_once):
            training.go_back(_noised(examples)[first : first + at_once], examples[first:][:at_once])
    rows = [Rows(padded(high * wide // 4), padded(length)) for high, wide, length in samples]
    planned = largest(CONFIG, plan, rows, Base(2))
    moments = 8 * dit_parameter_count(CONFIG)
    assert peak.bytes == pytest.approx(planned.all - moments, rel=0.1)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_narrow_weights_take_what_is_planned_for_them(form: str) -> None:
    plan, samples = TrainingPlan(0, 10, ALL), [(64, 64, 20)]
    transformer, examples = fake_transformer(CPU, form), _examples(samples)
    with Peak() as peak:
        Training(transformer, "sdpa", plan).go_back(_noised(examples), examples)
    rows = [Rows(padded(high * wide // 4), padded(length)) for high, wide, length in samples]
    planned = training_bytes(CONFIG, plan, rows, Base(2, form))
    weights = weight_bytes(CONFIG, 2, form)
    hidden = weights.block * (weights.block_count + CONFIG.n_refiner_layers)  # nothing views them
    moments = 8 * parameter_count(targets(ALL, CONFIG))
    assert peak.bytes + hidden == pytest.approx(planned.all - moments, rel=0.1)


def test_the_fastest_way_that_fits_is_found() -> None:
    plan = TrainingPlan(0, 10, ALL, samples_at_once=0, recompute="")
    batch = [Rows(4096, 128)] * 4
    found = {
        gib: fitting(CONFIG, plan, batch, Base(2), gib * 2**30)
        for gib in (140, 80, 40, 24, 16, 15, 13.5, 12)
    }
    ways = {gib: one and (one.recompute, one.samples_at_once) for gib, one in found.items()}
    assert ways == {
        140: (NOTHING, 4),
        80: (NOTHING, 2),
        40: (NOTHING, 1),
        24: (BLOCKS, 4),
        16: (BLOCKS, 1),
        15: (BLOCKS, 1),
        13.5: (OFFLOADED, 1),
        12: None,
    }
    roomy = replace(plan, full=True, lora=(), optimizer=Optimizer("adafactor"))
    alone = best_batch(CONFIG, roomy, batch[0], Base(2), 64 * 2**30)  # no gradient beside the way
    assert alone
    assert (alone.recompute, alone.samples_at_once) == (NOTHING, 1)
    compiled = fitting(CONFIG, replace(plan, compiled=True), batch, Base(2), 70 * 2**30)
    assert compiled
    assert (compiled.recompute, compiled.samples_at_once) == (ELEMENTWISE, 4)
