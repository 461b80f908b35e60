"""Pictures as files: PNG, JPEG and WebP from rows of 8-bit RGB, with a text beside the pixels."""

import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zimage_core.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling  # only whoever works with pictures pays for it
    from PIL.ImageFile import ImageFile

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""The formats that can be written, with their media types."""

DEFAULT_QUALITY = 95
"""For the formats that lose something."""

LONGEST_TEXT = {"png": 1_000_000, "webp": 1_000_000, "jpeg": 60_000}
"""The most bytes of text in a file; one segment of a JPEG holds 64 KiB."""

PREVIEW_SIDE_PX = 512
"""The longer side of a preview at most."""

_PNG_LEVEL = 1  # photographs of the model shrink by 3 % more at level 6, in five times the time
_KEYWORD = "zimage"
_MOST_PIXELS = 89_000_000
"""Where the library itself begins to warn of files that unpack to more than memory holds."""

_WINDOW_PX = 8
_SSIM_1, _SSIM_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
LONGEST_SIDE_PX = 1 << 16
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


def encode_preview(rgb: bytes, size: tuple[int, int]) -> tuple[tuple[int, int], bytes]:
    """A PNG of a picture, made smaller where it is large, and its size."""
    from PIL import Image

    image = Image.frombytes("RGB", size, rgb)
    image.thumbnail((PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
    return image.size, encode(image.tobytes(), image.size, "png", DEFAULT_QUALITY)


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

    def ssim(self, other: "PictureFile") -> float:
        """How alike the structures of two pictures of one size are: 1 for the same. By their
        brightness, the mean over windows that lie side by side."""
        from PIL import ImageMath

        def mean(term: Callable[[Any], Any]) -> Any:
            """Over each window."""
            values = ImageMath.lambda_eval(term, a=first, b=second)
            return values.reduce(_WINDOW_PX)

        first, second = (picture.image.convert("L").convert("F") for picture in (self, other))
        of_windows = ImageMath.lambda_eval(
            _similarity,
            a=mean(lambda at: at["a"] + 0),
            b=mean(lambda at: at["b"] + 0),
            aa=mean(lambda at: at["a"] * at["a"]),
            bb=mean(lambda at: at["b"] * at["b"]),
            ab=mean(lambda at: at["a"] * at["b"]),
        )
        return float(of_windows.reduce(of_windows.size).getpixel((0, 0)))


def _similarity(at: Any) -> Any:
    """SSIM of windows, by the means of both pictures' values, squares and products."""
    squares, product = at["a"] * at["a"] + at["b"] * at["b"], at["a"] * at["b"]
    covariance, variances = at["ab"] - product, at["aa"] + at["bb"] - squares
    structure = (covariance * 2 + _SSIM_2) / (variances + _SSIM_2)
    return structure * (product * 2 + _SSIM_1) / (squares + _SSIM_1)


def decode(data: bytes, name: str) -> PictureFile:
    """The picture in a file of this name; raises InvalidRequest for what is none."""
    with _opened(data, name) as opened:
        text = _text(opened)
        return PictureFile(opened.convert("RGB"), text, is_lossless=opened.format == "PNG")


def decode_for_model(data: bytes, name: str, longest_side: int) -> tuple[tuple[int, int], bytes]:
    """The size and the rows of RGB of a picture as a viewer shows it: turned as its EXIF says,
    over white. Raises InvalidRequest for what is none, before a large one is unpacked."""
    from PIL import Image, ImageOps

    with _opened(data, name) as opened:
        if max(opened.size) > longest_side:
            raise _unreadable(name, f"{opened.width}x{opened.height} is too large", longest_side)
        if opened.mode.startswith(("I", "F")):  # would be cut to black and white
            raise _unreadable(name, f"its pixels are of kind {opened.mode}, not of 8 bits")
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.size, image.convert("RGB").tobytes()


def detail(data: bytes, name: str) -> float:
    """How much a picture changes from pixel to pixel: less where it is blurred."""
    from PIL import Image, ImageFilter, ImageStat

    size, rgb = decode_for_model(data, name, LONGEST_SIDE_PX)
    laplacian = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)
    edges = Image.frombytes("RGB", size, rgb).convert("L").filter(laplacian)
    return float(ImageStat.Stat(edges).stddev[0])


def cut(data: bytes, name: str, size_px: tuple[int, int], *, flips: bool = False) -> bytes:
    """A PNG of a picture, scaled to cover a size, cut to it around its middle, and mirrored if
    wanted."""
    from PIL import Image

    fitted = _fitted(data, name, size_px, Image.Resampling.LANCZOS, flips=flips)
    return encode(fitted.tobytes(), size_px, "png", DEFAULT_QUALITY)


def cut_mask(
    data: bytes, name: str, size_px: tuple[int, int], cells: tuple[int, int], *, flips: bool = False
) -> bytes:
    """How bright a picture is that is cut like another: a byte for each of so many cells along
    width and height."""
    from PIL import Image

    fitted = _fitted(data, name, size_px, Image.Resampling.BILINEAR, flips=flips)
    return fitted.convert("L").resize(cells, Image.Resampling.BOX).tobytes()


def _fitted(
    data: bytes, name: str, size_px: tuple[int, int], how: "Resampling", *, flips: bool
) -> "Image":
    from PIL import Image, ImageOps

    size, rgb = decode_for_model(data, name, LONGEST_SIDE_PX)
    fitted = ImageOps.fit(Image.frombytes("RGB", size, rgb), size_px, how)
    return ImageOps.mirror(fitted) if flips else fitted


@contextmanager
def _opened(data: bytes, name: str) -> Iterator["ImageFile"]:
    from PIL import Image

    formats = [known.upper() for known in MEDIA_TYPES]
    try:
        opened = Image.open(io.BytesIO(data), formats=formats)
        if opened.width * opened.height > _MOST_PIXELS:
            raise _unreadable(name, f"{opened.width}x{opened.height} pixels are too many")
        yield opened
    except InvalidRequest:
        raise
    except Exception as error:  # noqa: BLE001 - a broken file breaks the library in many ways
        what = type(error).__name__ if "BytesIO" in str(error) else error
        raise _unreadable(name, f"not a readable PNG, JPEG or WebP file: {what}") from None


def _unreadable(name: str, what: str, longest_side: int | None = None) -> InvalidRequest:
    allowed = f"; the longest side allowed is {longest_side}" if longest_side else ""
    return InvalidRequest(f"{name}: {what}{allowed}", reason="PICTURE", fields={"path": name})


def _text(image: Any) -> str:
    if image.format == "PNG":
        return str(image.text.get(_KEYWORD, ""))
    comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    if isinstance(comment, bytes) and comment.startswith(_ASCII):
        return comment.removeprefix(_ASCII).decode("ascii", "replace")
    return ""
