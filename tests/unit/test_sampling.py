"""The sampler against a model of three lines."""

import pytest
import torch
from torch import Tensor

from dit_service.sampling.euler import text_to_image
from dit_service.sampling.forwards import NEGATIVE, POSITIVE, Forward, Run
from dit_service.sampling.guidance import guided
from dit_service.sampling.noise import initial_noise
from zimage_core.planning import schedule

SIGMAS = schedule.sigmas(schedule.OFFICIAL, 8, 3.0)
DATA = torch.full((16, 4, 4), 0.25)


def _perfect(forward: Forward) -> Tensor:
    """The velocity, data minus noise, of a model that knows the data."""
    return (DATA - forward.latents_CHW) / (1 - forward.time)


def test_a_perfect_model_leads_to_the_data() -> None:
    run = Run(text_to_image(initial_noise(1, (16, 4, 4)), SIGMAS, 0.0, 0.0, 1.0))
    times = []
    while run.step:
        [forward] = run.step.forwards
        assert forward.conditioning == POSITIVE
        times.append(forward.time)
        run.send((_perfect(forward),))
    assert times == [1 - sigma for sigma in SIGMAS[:-1]]
    assert run.steps_done == 8
    torch.testing.assert_close(run.latents_CHW, DATA)


def test_guided_steps_ask_for_both_until_truncation_ends_them() -> None:
    run = Run(text_to_image(initial_noise(1, (16, 4, 4)), SIGMAS, 2.0, 0.0, 0.3))
    asked = []
    while run.step:
        asked.append([forward.conditioning for forward in run.step.forwards])
        run.send(tuple(_perfect(forward) for forward in run.step.forwards))
    guided_steps = [sigma for sigma in SIGMAS[:-1] if 1 - sigma <= 0.3]
    assert asked == [[POSITIVE, NEGATIVE]] * len(guided_steps) + [[POSITIVE]] * (
        8 - len(guided_steps)
    )


def test_guidance_is_the_models_own_scale() -> None:
    positive, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided(positive, negative, 2.5, 0.0) == 3.0 + 2.5 * 2.0


@pytest.mark.parametrize("limit", [0.5, 1.0, 100.0])
def test_normalization_only_shrinks(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(16, 4, 4, generator=generator)
    negative = torch.randn(16, 4, 4, generator=generator)
    free = guided(positive, negative, 3.0, 0.0)
    bounded = guided(positive, negative, 3.0, limit)
    expected = min(free.norm(), positive.norm() * limit)
    torch.testing.assert_close(bounded.norm(), torch.as_tensor(expected))


def test_no_prediction_at_all_stays_none() -> None:
    nothing = torch.zeros(4)
    assert guided(nothing, nothing, 3.0, 1.0).isfinite().all()


def test_noise_is_diffusers_noise() -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    expected = torch.randn((1, 16, 8, 6), generator=generator)[0]
    assert torch.equal(initial_noise(7, (16, 8, 6)), expected)


def test_negative_seeds_are_seeds() -> None:
    assert initial_noise(-1, (16, 4, 4)).isfinite().all()
    assert not torch.equal(initial_noise(-1, (16, 4, 4)), initial_noise(-2, (16, 4, 4)))
