"""The engine's answers that no picture should ever hide."""

from pathlib import Path

import pytest
import torch

from dit_service import messages
from dit_service.engine.device import to_device
from dit_service.engine.generate import Studio
from dit_service.model import loading
from zimage_core.errors import InvalidRequest
from zimage_core.tensors import TensorData

WIDTH = 128


@pytest.mark.parametrize("first_sigma", [1.0, 3e38])
def test_a_picture_out_of_range_is_an_error_and_not_black(
    model_folder: Path, first_sigma: float
) -> None:
    cpu = torch.device("cpu")
    generator = Studio(
        loading.load_transformer(model_folder, cpu, torch.float32),
        loading.load_vae(model_folder, cpu, torch.float32),
        "sdpa",
        announce=lambda _what, _seconds: None,
    )
    request = messages.Generate(
        positive=TensorData("float32", (4, WIDTH), bytes(4 * WIDTH * 4)),
        negative=None,
        seeds=(1,),
        width_px=64,
        height_px=64,
        sigmas=(first_sigma, 0.0),
        guidance=0.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        is_solo=True,
    )
    events: list[object] = []
    with torch.inference_mode():
        if first_sigma == 1.0:
            generator.run(request, events.append)
            assert isinstance(events[-1], messages.Spent)
        else:
            with pytest.raises(InvalidRequest, match="range of numbers"):
                generator.run(request, events.append)
            assert not any(isinstance(event, messages.Picture) for event in events)


def test_elements_that_do_not_fill_their_shape_touch_no_memory() -> None:
    for size in (0, 15, 17, 1 << 20):
        with pytest.raises(ValueError, match="float32"):
            to_device(TensorData("float32", (2, 2), bytes(size)), torch.device("cpu"))
