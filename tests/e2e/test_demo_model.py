"""Through the services, the demo model draws what it is asked for; `make demo-eval` asks more."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image

from demo_model import checker
from demo_model.evaluation import MEASURE, ask, questions, shares, steering
from tests.e2e.services import Service, running
from zimage_client import AsyncClient, Picture, Preview
from zimage_client._embedded.stack import demo_model

pytestmark = pytest.mark.timeout(120)
EXACT = ("--device", "cpu", "--dtype", "float32")  # as diffusers computes here


@pytest.fixture(scope="module")
def encoder() -> Iterator[Service]:
    with running("encoder_service", "--model", str(demo_model()), *EXACT) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(encoder: Service) -> Iterator[Service]:
    flags = "--model", str(demo_model()), "--encoder", encoder.address, *EXACT
    with running("dit_service", *flags) as service:
        service.wait_until("SERVING")
        yield service


@pytest.mark.parametrize(
    ("kind", "count", "least"),
    [
        (MEASURE, 75, 0.95),
        ("wide", 30, 0.87),
        ("tall", 30, 0.87),
        ("unseen wording", 30, 0.85),
        ("filler around", 30, 0.9),
    ],
)
async def test_pictures_show_what_their_prompts_say(
    dit: Service, kind: str, count: int, least: float
) -> None:
    async with AsyncClient(dit.address) as client:
        answers = await ask(client, questions(kind, count))
    assert shares(answers)["all"] >= least
    sharp = [value for answer in answers for value in checker.sharpness(answer.picture)]
    assert np.median(sharp) >= 29  # of all 1,000 it is above 30


async def test_diffusers_makes_the_same_pictures_of_the_same_folder(dit: Service) -> None:
    pipeline = ZImagePipeline.from_pretrained(demo_model(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    asked = [question for kind in (MEASURE, "wide", "tall") for question in questions(kind, 2)]
    async with AsyncClient(dit.address) as client:
        answers = await ask(client, asked)
    for answer in answers:
        question = answer.question
        width, height = question.size
        [theirs] = pipeline(
            question.prompt,
            width=width,
            height=height,
            num_inference_steps=8,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(question.seed),
        ).images
        difference = np.abs(answer.picture.astype(int) - np.asarray(theirs).astype(int)).max()
        assert difference <= 1


async def test_previews_without_the_vae_show_the_picture_to_be(dit: Service) -> None:
    previews, pictures = [], []
    async with AsyncClient(dit.address) as client:
        for question in questions(MEASURE, 4):
            wish = {"seed": question.seed, "previews": "latents", "preview_interval": 6}
            async for event in client.stream(question.prompt, **wish):
                if isinstance(event, Preview | Picture):
                    shown = Image.open(io.BytesIO(event.data)).convert("RGB").resize((16, 16))
                    kept = previews if isinstance(event, Preview) else pictures
                    kept.append(np.asarray(shown, float))
    errors = [[np.abs(one - other).mean() for other in pictures] for one in previews]
    assert [int(np.argmin(row)) for row in errors] == [0, 1, 2, 3]


async def test_guidance_leads_away_from_the_negative_prompt(dit: Service) -> None:
    async with AsyncClient(dit.address) as client:
        found = await steering(client, 30)
    colours, led, kept = found.values()
    assert colours >= 5
    assert led >= 0.7
    assert kept >= 0.7
