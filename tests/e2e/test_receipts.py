"""A picture's file says how it was made, and that is enough to make it again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from tests.e2e.services import Service, running
from zimage_client import Client, InvalidRequest, NotFound, Prompt, read_receipt
from zimage_client.cli.main import main
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.embedding import EmbeddingFile


@pytest.fixture(scope="module")
def encoder(base_folder: Path) -> Iterator[Service]:
    with running("encoder_service", "--model", str(base_folder)) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(base_folder: Path, encoder: Service) -> Iterator[Service]:
    flags = "--model", str(base_folder), "--encoder", encoder.address
    with running("dit_service", *flags) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture
def picture(dit: Service, tmp_path: Path) -> Path:
    path = tmp_path / "out.png"
    flags = ["--steps", "4", "--seed", "7", "--width", "96", "--negative-prompt", "blurry"]
    assert _run("generate", "a lighthouse", "-o", str(path), *flags, dit=dit) == 0
    return path


def _run(*arguments: str, dit: Service) -> int:
    return main([*arguments, "--server", dit.address])


def _pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_it_says_how_it_was_made(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = read_receipt(picture)
    assert isinstance(receipt.positive, Prompt)
    assert isinstance(receipt.negative, Prompt)
    assert (receipt.positive.text, receipt.negative.text) == ("a lighthouse", "blurry")
    assert receipt.options["seed"] == 7
    assert main(["inspect", str(picture)]) == 0
    shown = capsys.readouterr().out
    for said in ("a lighthouse", "blurry", "96 x 128", "as they were made", "guidance    2.5"):
        assert said in shown
    assert main(["inspect", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["width_px"] == 96


def test_other_flags_change_just_what_they_name(picture: Path, dit: Service) -> None:
    legacy, longer = picture.with_name("legacy.png"), picture.with_name("longer.png")
    again = ["generate", "--from", str(picture)]
    assert _run(*again, "--schedule", "legacy", "-o", str(legacy), dit=dit) == 0
    assert _run("generate", "--from", str(legacy), "--steps", "5", "-o", str(longer), dit=dit) == 0
    options = read_receipt(longer).options
    assert (read_receipt(legacy).options["steps"], options["steps"]) == (4, 5)
    assert options["schedule"] == "legacy"


def test_a_smaller_copy_is_no_equal(picture: Path, dit: Service) -> None:
    copy = picture.with_name("copy.jpg")
    assert _run("generate", "--from", str(picture), "-o", str(copy), dit=dit) == 0
    opened = Image.open(copy)
    small = opened.resize((opened.width // 2, opened.height // 2))
    small.save(copy, "JPEG", exif=opened.getexif())
    assert _run("verify", str(copy), dit=dit) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_it_is_made_again_from_any_file(picture: Path, dit: Service, suffix: str) -> None:
    again, third = picture.with_name(f"again{suffix}"), picture.with_name("third.png")
    assert _run("generate", "--from", str(picture), "-o", str(again), dit=dit) == 0
    assert _run("verify", str(again), dit=dit) == 0
    assert _run("generate", "--from", str(again), "-o", str(third), dit=dit) == 0
    assert _pixels(third) == _pixels(picture)


def test_flags_change_what_the_receipt_says(picture: Path, dit: Service, tmp_path: Path) -> None:
    path = tmp_path / "other.png"
    flags = ["--sigmas", "1,0.5", "--guidance", "0", "-o", str(path), "--count", "2"]
    assert _run("generate", "a red square", "--from", str(picture), *flags, dit=dit) == 0
    receipt = read_receipt(tmp_path / "other-1.png")
    assert receipt.positive == Prompt(
        "a red square", hidden_layer=-2, long_prompt_mode="interpolate"
    )
    assert receipt.negative is None
    assert receipt.options["seed"] == 8
    assert receipt.options["sigmas"] == [1.0, 0.5]
    assert receipt.options["width"] == 96


def test_an_edited_file_is_told(
    picture: Path, dit: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(picture)
    text = image.text["zimage"]  # type: ignore[attr-defined]
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("zimage", text)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(picture, pnginfo=chunks)
    capsys.readouterr()
    assert _run("verify", str(picture), "--json", dit=dit) == 1
    line = json.loads(capsys.readouterr().out)
    assert (line["equal"], line["edited"], line["differences"]) == (True, True, {})


def test_what_differs_is_named(
    picture: Path, dit: Service, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--model", str(model_folder)
    with running("encoder_service", *flags) as encoder, Client(dit.address) as client:
        encoder.wait_until("SERVING")
        with running("dit_service", *flags, "--encoder", encoder.address) as other:
            other.wait_until("SERVING")
            plain = picture.with_name("plain.png")
            made = client.generate("a lighthouse", seed=7, steps=4, guidance=0.0)
            plain.write_bytes(made.pictures[0].data)
            capsys.readouterr()
            assert _run("verify", str(plain), "--json", dit=other) == 1
    line = json.loads(capsys.readouterr().out)
    assert not line["equal"]
    assert 0 < line["psnr_db"] < 40
    assert "positive identity" in line["differences"]


def test_without_metadata_nothing_is_told(dit: Service, tmp_path: Path) -> None:
    path = tmp_path / "bare.png"
    flags = ["--metadata", "none", "--steps", "1"]
    assert _run("generate", "a secret", "-o", str(path), *flags, dit=dit) == 0
    assert b"secret" not in path.read_bytes()
    with pytest.raises(NotFound, match="no receipt"):
        read_receipt(path)
    assert main(["inspect", str(path)]) == 3


def test_an_embedding_is_asked_for(
    dit: Service, encoder: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file, other = (tmp_path / name for name in ("e.png", "e.safetensors", "o.safetensors"))
    with Client(dit.address, encoder.address) as client:
        for target, text in ((file, "a cat"), (other, "a dog")):
            embedding_file.write(target, EmbeddingFile(client.encode(text), None))
    flags = ["--steps", "2", "--guidance", "0", "-o", str(path)]
    assert _run("generate", "--embedding", str(file), *flags, dit=dit) == 0
    assert _run("verify", str(path), dit=dit) == 2
    assert "--embedding FILE" in capsys.readouterr().err
    assert _run("verify", str(path), "--embedding", str(other), dit=dit) == 2
    assert _run("verify", str(path), "--embedding", str(file), dit=dit) == 0


def test_a_jpeg_has_room_for_so_much(dit: Service) -> None:
    with Client(dit.address) as client:
        long = Prompt("x", thinking=" " * 70_000)
        with pytest.raises(InvalidRequest) as refusal:
            client.generate(long, steps=1, format="jpeg")
        assert refusal.value.reason == "RECEIPT_SIZE"
