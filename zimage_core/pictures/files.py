"""Pictures as files: PNG, JPEG and WebP from rows of 8-bit RGB, with a text beside the pixels."""

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zimage_core.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image  # only whoever works with pictures pays for the import

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""The formats that can be written, with their media types."""

DEFAULT_QUALITY = 95
"""For the formats that lose something."""

LONGEST_TEXT = {"png": 1_000_000, "webp": 1_000_000, "jpeg": 60_000}
"""The most bytes of text in a file; one segment of a JPEG holds 64 KiB."""

_PNG_LEVEL = 1  # photographs of the model shrink by 3 % more at level 6, in five times the time
_KEYWORD = "zimage"
_EXIF, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"


def encode(
    rgb: bytes, size: tuple[int, int], file_format: str, quality: int, text: str = ""
) -> bytes:
    """The file of a picture of `size` (width, height) with an ASCII text, if there is one;
    `quality` is not used for PNG."""
    from PIL import Image, PngImagePlugin

    options: dict[str, Any] = {"quality": quality}
    if file_format == "png":
        options = {"compress_level": _PNG_LEVEL}
        if text:
            options["pnginfo"] = chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt(_KEYWORD, text, zip=len(text) > 1 << 12)
    elif text:
        options["exif"] = exif = Image.Exif()
        exif.get_ifd(_EXIF)[_USER_COMMENT] = _ASCII + text.encode("ascii")
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, rgb).save(buffer, file_format, **options)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture as it was found in a file."""

    image: "Image"
    text: str
    """The text beside the pixels; empty where there is none of ours."""
    is_lossless: bool
    """Whether the pixels are those that were written."""

    @property
    def pixels_sha256(self) -> str:
        """The digest of the rows of 8-bit RGB."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    def psnr(self, other: "PictureFile") -> float:
        """How close two pictures of one size are, in decibels; infinite for the same pixels."""
        from PIL import ImageChops

        histogram = ImageChops.difference(self.image, other.image).histogram()
        squares = sum(count * (level % 256) ** 2 for level, count in enumerate(histogram))
        if squares == 0:
            return math.inf
        values = 3 * self.image.width * self.image.height
        return 10 * math.log10(255**2 * values / squares)


def decode(data: bytes, name: str) -> PictureFile:
    """The picture in a file of this name; raises InvalidRequest for what is none."""
    from PIL import Image

    formats = [known.upper() for known in MEDIA_TYPES]
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            opened = Image.open(io.BytesIO(data), formats=formats)
            text = _text(opened)
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise InvalidRequest(
            f"{name}: not a readable PNG, JPEG or WebP file: {error}",
            reason="PICTURE",
            fields={"path": name},
        ) from None
    return PictureFile(image, text, is_lossless=opened.format == "PNG")


def _text(image: Any) -> str:
    if image.format == "PNG":
        return str(image.text.get(_KEYWORD, ""))
    comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    if isinstance(comment, bytes) and comment.startswith(_ASCII):
        return comment.removeprefix(_ASCII).decode("ascii", "replace")
    return ""
