"""A service whose blocks run compiled: the same pictures, alone, shared and with adapters."""

import io
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import adapter_files
from tests.e2e.services import Service, running
from zimage_client import Client, Options, Picture
from zimage_client._embedded.stack import demo_model
from zimage_client.cli.main import main as command

PROMPT = "a large red circle in the middle on a blue background"
COMPILING_SECONDS = 280.0
_CHANGED = {f"layers.{block}.attention.to_v": (192, 192) for block in range(4)}

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiled code needs g++"),
]


@pytest.fixture(scope="module")
def encoder() -> Iterator[Service]:
    with running("encoder_service", "--model", str(demo_model())) as service:
        service.wait_until("SERVING")
        yield service


def _dit(encoder: Service, compile_: str, store: Path) -> Iterator[Service]:
    flags = "--encoder", encoder.address, "--compile", compile_, "--store", str(store)
    with running("dit_service", "--model", str(demo_model()), *flags) as service:
        service.wait_until("SERVING", COMPILING_SECONDS)
        yield service


@pytest.fixture(scope="module")
def eager(encoder: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from _dit(encoder, "off", tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def compiled(encoder: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from _dit(encoder, "on", tmp_path_factory.mktemp("store"))


def _rgb(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.data)), int)


def test_pictures_are_those_of_eager_blocks(
    eager: Service, compiled: Service, tmp_path: Path
) -> None:
    lora = adapter_files.random_lora(_CHANGED, size=0.1)
    file = adapter_files.write(tmp_path / "some.safetensors", lora, "bare")
    wishes = [
        Options(seed=seed, steps=4, width=width, height=height)
        for seed, (width, height) in enumerate([(128, 128), (96, 160), (64, 112), (128, 96)])
    ]
    wishes += [Options(**wish, adapters={file: 1.0}) for wish in wishes[:2]]
    with Client(eager.address) as client:
        expected = [client.generate(PROMPT, **wish).pictures[0] for wish in wishes]
    with Client(compiled.address) as client, ThreadPoolExecutor(len(wishes)) as pool:
        plan = client.describe().numeric_plan
        assert plan is not None
        assert plan.compiled
        alone = [client.generate(PROMPT, **wish, packing="solo").pictures[0] for wish in wishes]
        together = list(pool.map(lambda wish: client.generate(PROMPT, **wish).pictures[0], wishes))
    for one, other, right in zip(alone, together, expected, strict=True):
        assert np.abs(_rgb(one) - _rgb(right)).max() <= 1
        assert np.abs(_rgb(other) - _rgb(right)).max() <= 1


def test_the_plan_says_so(
    eager: Service, compiled: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    at = ["--server", compiled.address, "--isolated"]
    assert command(["generate", PROMPT, *at, "--steps", "4", "--solo", "-o", str(out)]) == 0
    assert command(["verify", str(out), *at]) == 0
    assert command(["info", *at]) == 0
    assert "compiled    yes: it worked" in capsys.readouterr().out
    command(["verify", str(out), "--server", eager.address, "--isolated"])
    assert "compiled" in capsys.readouterr().out
