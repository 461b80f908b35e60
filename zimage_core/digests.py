"""What names some bytes by their content: their SHA-256 in lower-case hexadecimal."""

import re
from typing import NamedTuple

from zimage_core.errors import InvalidRequest

_SHA256 = re.compile("[0-9a-f]{64}")


class Named(NamedTuple):
    """Some bytes, by what names them."""

    sha256: str
    size_bytes: int


def check(sha256: str, field: str) -> None:
    """Raises InvalidRequest unless it is one."""
    if not _SHA256.fullmatch(sha256):
        raise InvalidRequest.given(field, sha256[:100], "64 hexadecimal digits", "DIGEST")


def is_digest(text: str) -> bool:
    """Whether it is one."""
    return _SHA256.fullmatch(text) is not None
