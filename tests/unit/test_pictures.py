"""Picture files: what is written comes back, and what is none is refused."""

import io
import math
import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from zimage_core.errors import InvalidRequest, ZImageError
from zimage_core.pictures import files
from zimage_core.wire import receipts

SIZE = (32, 16)
RGB = bytes(range(256)) * 6
TEXT = '{"a": "\\u00e9"}'


@pytest.mark.parametrize("file_format", list(files.MEDIA_TYPES))
@pytest.mark.parametrize("length", [0, 1, 50_000])
def test_a_text_comes_back_beside_the_pixels(file_format: str, length: int) -> None:
    text = (TEXT * length)[:length]
    found = files.decode(files.encode(RGB, SIZE, file_format, 95, text), "x")
    assert found.text == text
    assert found.image.size == SIZE
    assert found.is_lossless == (file_format == "png")
    assert (found.image.tobytes() == RGB) == found.is_lossless


def test_other_programs_find_the_text_where_it_is_promised() -> None:
    png = Image.open(io.BytesIO(files.encode(RGB, SIZE, "png", 95, TEXT)))
    assert png.text == {"zimage": TEXT}  # type: ignore[attr-defined]
    webp = Image.open(io.BytesIO(files.encode(RGB, SIZE, "webp", 95, TEXT)))
    assert webp.getexif().get_ifd(0x8769)[0x9286] == b"ASCII\0\0\0" + TEXT.encode()


def test_distance_in_decibels() -> None:
    def picture(level: int) -> files.PictureFile:
        return files.decode(files.encode(bytes([level]) * 1536, SIZE, "png", 95), "x")

    assert picture(9).psnr(picture(9)) == math.inf
    assert picture(0).psnr(picture(255)) == 0
    assert picture(10).psnr(picture(11)) == pytest.approx(48.13, abs=0.01)


def _bomb() -> bytes:
    """A few bytes that say they are 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", files.encode(RGB, SIZE, "png", 95)[:80], _bomb(), b"\x89PNG\r\n\x1a\n"],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"out\.png") as refusal:
        files.decode(data, "out.png")
    assert refusal.value.reason == "PICTURE"


@settings(deadline=None, max_examples=400)
@given(
    file_format=st.sampled_from(list(files.MEDIA_TYPES)),
    position=st.integers(0, 100_000),
    byte=st.integers(0, 255),
    cut=st.integers(0, 10_000),
)
def test_no_damage_makes_anything_but_a_typed_error(
    file_format: str, position: int, byte: int, cut: int
) -> None:
    data = bytearray(files.encode(RGB, SIZE, file_format, 95, "{}"))
    data[position % len(data)] = byte
    for read in (files.decode, lambda data, name: files.decode_for_model(data, name, 64)):
        with suppress(ZImageError):
            read(bytes(data[: cut or None]), "x")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "mask": "x"}', "[" * 100_000]
)
def test_what_is_no_receipt_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"out\.png") as refusal:
        receipts.from_text(text, name="out.png")
    assert refusal.value.reason == "RECEIPT"


def _png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_the_model_sees_what_a_viewer_shows() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = _png(Image.new("RGB", (32, 16)), exif=exif)
    assert files.decode_for_model(turned, "x", 32)[0] == (16, 32)
    half = _png(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))
    assert files.decode_for_model(half, "x", 32) == ((1, 1), bytes([255, 127, 127]))
    with pytest.raises(InvalidRequest, match="48x16 is too large; the longest side allowed is 32"):
        files.decode_for_model(_png(Image.new("RGB", (48, 16))), "x", 32)
    with pytest.raises(InvalidRequest, match="not of 8 bits"):
        files.decode_for_model(_png(Image.new("I;16", (16, 16))), "x", 32)


def test_pictures_and_masks_are_cut_alike_and_mirrored_if_wanted() -> None:
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 255, 255), (10, 0, 20, 20))  # what is left of it: the middle 20 by 20
    data = _png(picture)
    for flips, expected in ((False, [255, 0]), (True, [0, 255])):
        cut = files.decode(files.cut(data, "x", (20, 20), flips=flips), "x").image
        assert [cut.getpixel((at, 10)) for at in (4, 15)] == [(level,) * 3 for level in expected]
        cells = files.cut_mask(data, "x", (20, 20), (2, 1), flips=flips)
        assert list(cells) == expected


def test_what_is_blurred_has_less_detail() -> None:
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    details = [
        files.detail(_png(noise.filter(ImageFilter.GaussianBlur(radius))), "x")
        for radius in (0, 1, 4)
    ]
    assert details[0] > 2 * details[1] > 4 * details[2] > 0


def test_previews_are_small() -> None:
    size, file = files.encode_preview(bytes(3 * 1024 * 600), (1024, 600))
    assert size == (512, 300)
    assert Image.open(io.BytesIO(file)).size == size
    assert files.encode_preview(bytes(3 * 8 * 4), (8, 4))[0] == (8, 4)
