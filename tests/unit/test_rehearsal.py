"""What is tried to tell how long steps of a training last."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_service import messages
from dit_service.engine.diary import Diary
from dit_service.engine.training import Alone, Means, Trainings
from dit_service.model import loading
from dit_service.model.transformer import ZImageTransformer
from dit_service.training.rehearsal import Rehearsal
from zimage_core.errors import NotReady
from zimage_core.planning.training import LearningRate, LoraGroup, Noise, Optimizer, TrainingPlan
from zimage_core.planning.training_memory import BLOCKS, NOTHING, Rows

SAMPLE = Rows(64, 32)
LORA = LoraGroup("layers", 0, 1, ("attention.to_q",), rank=2, alpha=2.0)
PLAN = TrainingPlan(
    seed=0, step_count=1, lora=(LORA,), noise=Noise(), optimizer=Optimizer(),
    learning_rate=LearningRate(), samples_at_once=0, recompute="",
)  # fmt: skip


class Two(Alone):
    """As if another device learnt half of each batch."""

    device_count = 2

    def largest_part(self, count: int) -> int:
        return -(-count // 2)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ZImageTransformer:
    with torch.inference_mode():
        return loading.load_transformer(model_folder, torch.device("cpu"), torch.float32)


def _forecast(
    model: ZImageTransformer, asked: messages.PlanTraining, means: Means
) -> messages.TrainingForecast:
    told: list[Any] = []
    trainings = Trainings(model, "sdpa", lambda *_told: None, Diary(), means)
    with torch.inference_mode():
        for _ in trainings.forecast(asked, told.append):
            assert not told  # it waits for its turn first
    [forecast] = told
    return forecast  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("sample", "at_once", "rows", "count"),
    [
        (SAMPLE, 8, SAMPLE, 8),
        (SAMPLE, 64, SAMPLE, 16),  # of captions there is no room for more
        (Rows(4096, 32), 4, Rows(4096, 32), 1),
        (Rows(1 << 18, 1 << 18), 4, Rows(4096, 512), 1),
    ],
)
def test_no_more_is_tried_than_there_is_time_for(
    sample: Rows, at_once: int, rows: Rows, count: int
) -> None:
    rehearsal = Rehearsal(sample, at_once)
    assert rehearsal.tried == rows
    assert rehearsal.count == count


def test_what_is_computed_again_and_learnt_in_full_costs_forwards_more(
    model: ZImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rehearsal, "_tried_out", lambda *_: (1.0, 2.0))

    def seconds(sample: Rows, at_once: int, **how: Any) -> float:
        plan = replace(PLAN, recompute=NOTHING, **how)
        return Rehearsal(sample, at_once).seconds_per_sample(model, "sdpa", plan)

    usual = seconds(SAMPLE, 1)
    assert seconds(SAMPLE, 2) == pytest.approx(usual / 2)  # two were tried in that time
    assert seconds(SAMPLE, 1, full=True) == pytest.approx(usual * 4 / 3)
    again = Rehearsal(SAMPLE, 1).seconds_per_sample(model, "sdpa", replace(PLAN, recompute=BLOCKS))
    assert again == pytest.approx(usual * 4 / 3)
    large = seconds(Rows(16 * 4096, 512), 1) / seconds(Rows(4096, 512), 1)
    assert large > 16  # attention grows faster than what it looks at


def test_an_open_batch_is_as_many_as_all_devices_compute_at_once(model: ZImageTransformer) -> None:
    asked = messages.PlanTraining(PLAN, (SAMPLE,), batch_is_open=True)
    one = _forecast(model, asked, Means(usual_bytes=1 << 30))
    two = _forecast(model, asked, Means(usual_bytes=1 << 30, company=Two()))
    assert one.plan.samples_at_once == one.batch_size > 1
    assert two.batch_size == 2 * one.batch_size
    assert two.taken == one.taken


def test_each_device_takes_its_part(model: ZImageTransformer) -> None:
    asked = messages.PlanTraining(replace(PLAN, samples_at_once=8), (SAMPLE,) * 8, False)
    one, two = (_forecast(model, asked, Means(company=who)) for who in (Alone(), Two()))
    assert one.batch_size == two.batch_size == 8
    assert two.taken.step < one.taken.step


def test_without_room_to_try_it_there_is_no_time(
    model: ZImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Rehearsal, "_tried_out", fail)
    asked = messages.PlanTraining(PLAN, (SAMPLE,), batch_is_open=False)
    assert _forecast(model, asked, Means()).step_seconds is None


def test_what_never_fits_is_refused_and_what_may_is_told(model: ZImageTransformer) -> None:
    long = Rows(64, 512)  # as captions are at most: real ones may be shorter
    plan = replace(PLAN, samples_at_once=4, recompute=BLOCKS)
    takes = _forecast(model, messages.PlanTraining(plan, (long,) * 4, False), Means()).taken
    short = _forecast(model, messages.PlanTraining(plan, (SAMPLE,) * 4, False), Means()).taken
    between = Means(room_bytes=(takes.learnt + takes.step + short.learnt + short.step) / 2)
    told = _forecast(model, messages.PlanTraining(plan, (long,) * 4, False), between)
    assert told.room_bytes < told.taken.learnt + told.taken.step
    with pytest.raises(NotReady, match="4 samples at once, recompute blocks"):
        _forecast(model, messages.PlanTraining(plan, (long,) * 4, False), Means(room_bytes=1e5))
