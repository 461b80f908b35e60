"""Services whose weights are narrow, or take turns on the device: as good as they say."""

import io
from collections.abc import Iterator
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
WISH = Options(seed=3, packing="solo")
LEAST_PSNR_DB = 30.0
ROOM_BYTES = "15000000"
"""Of the 20.5 MB that the demo model's transformer takes in float32."""


@pytest.fixture(scope="module")
def encoder() -> Iterator[Service]:
    with running("encoder_service", "--model", str(demo_model())) as service:
        service.wait_until("SERVING")
        yield service


def _dit(encoder: Service, store: Path, *flags: str) -> Iterator[Service]:
    usual = "--model", str(demo_model()), "--encoder", encoder.address, "--store", str(store)
    with running("dit_service", *usual, *flags) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def whole(encoder: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from _dit(encoder, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def streamed(encoder: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = tmp_path_factory.mktemp("store")
    yield from _dit(encoder, store, "--max-weight-bytes", ROOM_BYTES)


@pytest.fixture(scope="module")
def narrow(encoder: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Narrow weights that take turns."""
    store = tmp_path_factory.mktemp("store")
    yield from _dit(encoder, store, "--weights", "fp8_matmul", "--max-weight-bytes", "9000000")


def _rgb(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.data)), float)


def test_weights_that_take_turns_draw_the_same(
    whole: Service, streamed: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = adapter_files.random_lora({"layers.1.attention.to_v": (192, 192)}, size=0.1)
    file = adapter_files.write(tmp_path / "some.safetensors", lora, "bare")
    wishes = [
        WISH,
        Options(**WISH, guidance=1.0, force_guidance=True),
        Options(**WISH, adapters={file: 1.0}),
    ]
    with Client(whole.address) as one, Client(streamed.address) as other:
        for wish in wishes:
            expected = one.generate(PROMPT, **wish).pictures[0].pixels_sha256
            assert other.generate(PROMPT, **wish).pictures[0].pixels_sha256 == expected
        assert other.describe().streamed_block_count > 0
    assert command(["info", "--server", streamed.address, "--isolated"]) == 0
    told = capsys.readouterr().out
    assert "weights     full: as the file has them" in told
    assert "blocks come from host memory in every step" in told


def test_narrow_weights_draw_nearly_the_same_and_say_so(
    whole: Service, narrow: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(whole.address) as one, Client(narrow.address) as other:
        expected, ours = (_rgb(c.generate(PROMPT, **WISH).pictures[0]) for c in (one, other))
        psnr_db = 10 * np.log10(255**2 / np.square(expected - ours).mean())
        assert psnr_db >= LEAST_PSNR_DB
        described = other.describe()
        assert described.streamed_block_count > 0
        assert described.numeric_plan is not None
        assert described.numeric_plan.weights == "fp8_matmul"
        assert "latents' cosine 0.99" in described.weights_reason
    out, at = tmp_path / "out.png", ["--isolated", "--server"]
    assert command(["generate", PROMPT, "--solo", "-o", str(out), *at, narrow.address]) == 0
    assert command(["verify", str(out), *at, narrow.address]) == 0
    capsys.readouterr()
    command(["verify", str(out), *at, whole.address])
    assert "fp8_matmul" in capsys.readouterr().out


def test_a_fused_adapter_is_that_of_all_pictures(
    encoder: Service, whole: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = adapter_files.random_lora({"layers.1.attention.to_v": (192, 192)}, size=0.2)
    file = adapter_files.write(tmp_path / "some.safetensors", lora, "bare")
    flags = "--fused-adapter", str(file), "--fused-adapter-scale", "0.8"
    for fused in _dit(encoder, tmp_path / "store", *flags):
        with Client(whole.address) as one, Client(fused.address) as other:
            beside = one.generate(PROMPT, **WISH, adapters={file: 0.8}).pictures[0]
            plain = one.generate(PROMPT, **WISH).pictures[0]
            ours = other.generate(PROMPT, **WISH)
        assert np.abs(_rgb(ours.pictures[0]) - _rgb(beside)).max() <= 1
        assert np.abs(_rgb(ours.pictures[0]) - _rgb(plain)).max() > 10
        plan = ours.completed.numeric_plan
        assert (len(plan.fused_adapter), plan.fused_adapter_scale) == (64, 0.8)
        assert command(["info", "--server", fused.address, "--isolated"]) == 0
        assert f"fused       adapter {plan.fused_adapter}, 0.8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--max-weight-bytes", "100000"], "100000 bytes are given, and "),
        (["--weights", "fp4"], "weights"),
        (["--fused-adapter", "/nowhere.safetensors"], "fused_adapter /nowhere"),
        (["--vae-device", "cuda"], "device cuda: "),
    ],
)
def test_what_cannot_be_is_said_at_the_start(flags: list[str], complaint: str) -> None:
    with running("dit_service", "--model", str(demo_model()), *flags) as service:
        assert service.wait_for_exit() != 0
        assert complaint in "".join(service.log)
