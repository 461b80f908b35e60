"""E4 and E4b: a picture depends neither on the way its request came nor on who computes beside."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_service import messages
from dit_service.engine.generate import Emit, Studio
from dit_service.model import loading
from tests.e2e.services import running
from zimage_client import Client, Options
from zimage_client.cli.main import main as command
from zimage_core.formats import embedding as embedding_file
from zimage_core.planning import schedule
from zimage_core.tensors import TensorData

WIDTH = 128
CLOSE = 1e-5
LARGEST_DIFFERENCE = 1  # of 255


def _request(
    number: int, is_guided: bool, side_px: int, tokens: int, steps: int
) -> messages.Generate:
    draw = torch.Generator().manual_seed(number)

    def embedding(length: int) -> TensorData:
        values = torch.randn(length, WIDTH, generator=draw)
        return TensorData("float32", (length, WIDTH), values.numpy().tobytes())

    return messages.Generate(
        positive=embedding(tokens),
        negative=embedding(5) if is_guided else None,
        seeds=(number,),
        width_px=side_px,
        height_px=side_px + 16,
        sigmas=schedule.sigmas(schedule.OFFICIAL, steps, 6.0),
        guidance=3.0 if is_guided else 0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        is_solo=False,
    )


REQUESTS = [
    _request(1, True, 128, 31, 6),
    _request(2, False, 64, 1, 4),
    _request(3, True, 160, 200, 5),
    _request(4, False, 16, 33, 8),
]


def _keeper(pictures: list[messages.Picture]) -> Emit:
    return lambda event: pictures.append(event) if isinstance(event, messages.Picture) else None


@pytest.mark.parametrize("prompts", [[0, 1], [3, 2, 1, 0]])
@torch.inference_mode()
def test_beside_others_it_is_the_same(base_folder: Path, prompts: list[int]) -> None:
    cpu = torch.device("cpu")
    studio = Studio(
        loading.load_transformer(base_folder, cpu, torch.float32),
        loading.load_vae(base_folder, cpu, torch.float32),
        "sdpa",
        announce=lambda _what, _seconds: None,
    )
    alone: dict[int, list[messages.Picture]] = {number: [] for number in prompts}
    together: dict[int, list[messages.Picture]] = {number: [] for number in prompts}

    for number in prompts:
        studio.run(REQUESTS[number], _keeper(alone[number]))
    works = {n: studio.work(REQUESTS[n], _keeper(together[n])) for n in prompts}
    asked = {number: next(work) for number, work in works.items()}
    for step in count():
        if not asked:
            break
        predicted = studio.predict(list(asked.values()))
        for (number, one), own in zip(list(asked.items()), predicted, strict=True):
            [single] = studio.predict([one])
            for packed, lone in zip(own.velocities, single.velocities, strict=True):
                assert (packed - lone).abs().max() <= CLOSE * lone.abs().max(), step
            try:
                asked[number] = works[number].send(own)
            except StopIteration:
                del asked[number]
    for number in prompts:
        [one], [other] = alone[number], together[number]
        pixels = [np.frombuffer(picture.rgb, np.uint8).astype(int) for picture in (one, other)]
        assert pixels[0].std() > 1
        assert np.abs(pixels[0] - pixels[1]).max() <= LARGEST_DIFFERENCE


def test_whichever_way_it_comes_it_is_the_same(base_folder: Path, tmp_path: Path) -> None:
    with running("encoder_service", "--model", str(base_folder)) as encoder:
        encoder.wait_until("SERVING")
        flags = "--model", str(base_folder), "--encoder", encoder.address
        with running("dit_service", *flags) as dit:
            dit.wait_until("SERVING")
            wish = Options(seed=9, steps=6, guidance=2.0, packing="solo")
            prompt, file = "a red circle on a blue background", tmp_path / "prompt.safetensors"
            encode = ["encode", prompt, "-o", str(file), "--encoder", encoder.address]
            assert command(encode) == 0
            with Client(dit.address) as far, Client(dit.address, encoder.address) as near:
                saved = embedding_file.read(file).embedding
                made = [
                    far.generate(prompt, **wish),
                    far.generate(prompt, **wish),
                    near.generate(prompt, **wish),
                    far.generate(saved, **wish),
                ]
    assert len({one.pictures[0].pixels_sha256 for one in made}) == 1
