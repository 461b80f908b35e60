"""What can be had of latents and the VAE by themselves: previews, EncodeImages, DecodeLatents."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from dit_service.model.preview import procedural_pictures
from tests.e2e.services import Service, running
from zimage_client import (
    Accepted,
    Client,
    DecodedImage,
    Embedding,
    InvalidRequest,
    Numerics,
    Options,
    Picture,
    Preview,
    Recipe,
    TensorData,
    ZImageError,
)
from zimage_client.cli.main import main as command

WISH = Options(width=96, height=64, steps=6, seed=3)


@pytest.fixture(scope="module")
def clear_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose VAE shows the picture in its latents: without its residual branches it is
    nearly linear."""
    folder = tmp_path_factory.mktemp("clear") / "clear"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("text_encoder"))
    [path] = (folder / "vae").glob("*.safetensors")
    weights = load_file(path)
    for name, weight in weights.items():
        if name.startswith("encoder.") and ("conv2" in name or "to_out" in name):
            weight.zero_()
    save_file(weights, path)
    return folder


@pytest.fixture(scope="module")
def dit(clear_folder: Path) -> Iterator[Service]:
    with running("dit_service", "--model", str(clear_folder)) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture
def client(dit: Service) -> Iterator[Client]:
    with Client(dit.address) as client:
        yield client


@pytest.fixture(scope="module")
def embedding() -> Embedding:
    rows = np.random.default_rng(0).standard_normal((12, 128), dtype=np.float32)
    return Embedding(
        tensor=TensorData("float32", rows.shape, rows.tobytes()),
        identity="",
        recipe=Recipe(1, -2, 100),
        numerics=Numerics("float32", "float32", "numpy", "cpu"),
        token_count=12,
        token_ids_sha256="",
    )


def _events(client: Client, embedding: Embedding, **more: object) -> list[object]:
    return list(client.stream(embedding, **(WISH | more)))  # type: ignore[arg-type]


def _pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def _file(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_previews_come_between_steps_and_change_nothing(
    client: Client, embedding: Embedding
) -> None:
    description = client.describe()
    assert description.model is not None
    assert description.model.preview_r_squared > 0.5
    plain = _events(client, embedding)
    events = _events(client, embedding, previews="auto", preview_interval=2)
    [accepted] = [event for event in events if isinstance(event, Accepted)]
    assert (accepted.previews, accepted.preview_interval) == ("latents", 2)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.step for preview in previews] == [2, 4]
    assert all((preview.width, preview.height) == (12, 8) for preview in previews)
    assert all(_pixels(preview.data).shape == (8, 12, 3) for preview in previews)
    [one], [other] = (
        [event.pixels_sha256 for event in run if isinstance(event, Picture)]
        for run in (plain, events)
    )
    assert one == other
    assert not any(isinstance(event, Preview) for event in plain)


def test_a_preview_by_the_vae_is_the_picture_of_the_expected_end(
    client: Client, embedding: Embedding
) -> None:
    """With one noise level above the last, the step to it expects the very end that it comes to
    when the last level is left out."""
    wish = {"steps": None, "sigmas": [1.0, 0.5], "shift": 1.0}
    events = _events(client, embedding, previews="vae", **wish)
    [preview] = [event for event in events if isinstance(event, Preview)]
    [straight] = client.generate(
        embedding, **(WISH | {"steps": None, "sigmas": [1.0], "shift": 1.0})
    ).pictures
    assert np.abs(_pixels(preview.data) - _pixels(straight.data)).max() <= 1


def test_a_map_that_tells_too_little_is_not_used(model_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("text_encoder"))
    with running("dit_service", "--model", str(bare)) as service, Client(service.address) as client:
        service.wait_until("SERVING")
        model = client.describe().model
        assert model is not None
        assert model.preview_r_squared < 0.5
        rows = TensorData("float32", (1, 128), bytes(512))
        recipe, numerics = Recipe(1, -2, 9), Numerics("float32", "float32", "", "cpu")
        embedding = Embedding(rows, "", recipe, numerics, 1, "")
        with pytest.raises(InvalidRequest) as refusal:
            client.generate(embedding, previews="latents")
        assert refusal.value.reason == "PREVIEW_UNAVAILABLE"
        accepted, *_ = client.stream(embedding, previews="auto", width=16, height=16, steps=1)
        assert isinstance(accepted, Accepted)
        assert accepted.previews == "vae"


@pytest.mark.parametrize("wish", [{"preview_interval": 0}, {"preview_interval": 10**6}])
def test_odd_wishes_for_previews_are_refused(
    client: Client, embedding: Embedding, wish: Options
) -> None:
    with pytest.raises(InvalidRequest, match=r"spec\.previews\.interval_steps"):
        client.generate(embedding, **(WISH | {"previews": "auto"} | wish))


def test_the_command_line_writes_previews(
    dit: Service, embedding: Embedding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from zimage_core.formats import embedding as embedding_file
    from zimage_core.formats.embedding import EmbeddingFile

    given, folder = tmp_path / "e.safetensors", tmp_path / "previews"
    embedding_file.write(given, EmbeddingFile(embedding, None))
    flags = ["--embedding", str(given), "--server", dit.address, "-o", str(tmp_path / "out.png")]
    size = ["--width", "64", "--height", "64", "--steps", "4"]
    shown = ["--preview", str(folder), "--preview-every", "2"]
    assert command(["generate", *flags, *size, *shown]) == 0
    assert [path.name for path in folder.iterdir()] == ["out-step-002.png"]
    (tmp_path / "out.png").unlink()
    assert command(["generate", *flags, *size, *shown]) == 2
    assert "out-step-002.png exists" in capsys.readouterr().err
    assert command(["generate", *flags, *size, "--preview-every", "2"]) == 2
    assert "no effect without --preview" in capsys.readouterr().err
    assert command(["generate", *flags, *size, "--preview", "terminal"]) == 2
    assert "cannot show pictures" in capsys.readouterr().err


def test_pictures_become_the_latents_that_diffusers_makes(
    client: Client, clear_folder: Path
) -> None:
    pictures = [picture.numpy() for picture in procedural_pictures(5, 64)]
    files = [_file(picture) for picture in pictures]
    files.insert(2, b"no picture")
    files.insert(4, _file(pictures[0][:60]))
    results = dict(client.encode_images(files))
    assert sorted(results) == list(range(7))
    failures = {n: one.reason for n, one in results.items() if isinstance(one, ZImageError)}
    assert failures == {2: "PICTURE", 4: "SIZE"}
    assert "nearest 48 or 64" in str(results[4])
    vae = AutoencoderKL.from_pretrained(clear_folder / "vae")
    x = torch.from_numpy(pictures[0].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        mean = vae.encode(x).latent_dist.mean[0]
    theirs = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    ours = results[0]
    assert isinstance(ours, TensorData)
    assert ours.shape == (16, 8, 8)
    found = np.frombuffer(ours.data, np.float32).reshape(ours.shape)
    np.testing.assert_allclose(found, theirs.numpy(), atol=1e-5)


def test_latents_become_pictures(client: Client, clear_folder: Path) -> None:
    [(_, latents)] = client.encode_images([_file(procedural_pictures(4, 64)[3].numpy())])
    assert isinstance(latents, TensorData)
    values = np.frombuffer(latents.data, np.float32).copy()
    values[0] = np.nan
    broken = TensorData("float32", latents.shape, values.tobytes())
    flat = TensorData("float32", (16, 64), latents.data)
    results = dict(client.decode_latents([latents, broken, flat, latents]))
    failures = {n: one.reason for n, one in results.items() if isinstance(one, ZImageError)}
    assert failures == {1: "NOT_FINITE", 2: "LATENTS_SHAPE"}
    first, last = results[0], results[3]
    assert isinstance(first, DecodedImage)
    assert first == last
    assert (first.width, first.height, first.media_type) == (64, 64, "image/png")
    vae = AutoencoderKL.from_pretrained(clear_folder / "vae")
    values = np.frombuffer(latents.data, np.float32).reshape(1, *latents.shape).copy()
    z = torch.from_numpy(values) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.inference_mode():
        theirs = (vae.decode(z).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    assert np.abs(_pixels(first.data) - theirs.round().numpy()).max() <= 1
    [(_, small)] = client.decode_latents([latents], format="jpeg", quality=30)
    assert isinstance(small, DecodedImage)
    assert small.media_type == "image/jpeg"
    assert small.pixels_sha256 == first.pixels_sha256
    [(_, refused)] = client.decode_latents([latents], format="png", quality=30)
    assert isinstance(refused, InvalidRequest)
    assert str(refused).startswith("quality")


def test_two_streams_can_be_joined(client: Client) -> None:
    """The second asks the client for its items while it runs."""
    files = [_file(picture.numpy()) for picture in procedural_pictures(3, 64)]
    latents = (found for _, found in client.encode_images(files))
    images = dict(client.decode_latents(latents))  # type: ignore[arg-type]
    assert sorted(images) == [0, 1, 2]
    assert all(isinstance(image, DecodedImage) for image in images.values())


def test_a_picture_with_broken_metadata_fails_alone(client: Client) -> None:
    good = _file(procedural_pictures(1, 64)[0].numpy())
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x0c\0\0\0\x01\0\0"  # cut off
    broken = io.BytesIO()
    Image.open(io.BytesIO(good)).convert("RGB").save(broken, "JPEG", exif=exif)
    results = dict(client.encode_images([good, broken.getvalue(), good]))
    assert isinstance(results[0], TensorData)
    assert isinstance(results[2], TensorData)
    assert isinstance(results[1], InvalidRequest | TensorData)


def test_latents_that_overflow_are_no_black_picture(client: Client) -> None:
    huge = TensorData("float32", (16, 8, 8), np.full((16, 8, 8), 1e38, np.float32).tobytes())
    [(_, refused)] = client.decode_latents([huge])
    assert isinstance(refused, InvalidRequest)
    assert refused.reason == "NOT_FINITE"


def test_conversions_and_pictures_run_side_by_side(client: Client, embedding: Embedding) -> None:
    """Neither a stream of conversions nor a long request keeps the other waiting to its end."""
    file = _file(procedural_pictures(1, 128)[0].numpy())
    requests = client.stream(embedding, **(WISH | {"steps": 1000}))  # type: ignore[misc]
    next(requests)
    results = dict(client.encode_images([file] * 20))
    assert len(results) == 20
    assert not any(isinstance(one, ZImageError) for one in results.values())
    assert next(requests) is not None
    requests.close()
