"""The dataset file: pictures by their digests, what they show and how they are learnt from, a JSON
object a line."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from zimage_core import digests
from zimage_core.errors import InvalidRequest

MEDIA_TYPE = "application/jsonl"
MOST_REPEATS = 10_000

_LONGEST_CAPTION = 100_000
_MOST_PIXELS = 1 << 16
"""Along a side."""


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and its caption."""

    sha256: str
    """Of the picture's file."""
    size_bytes: int
    width_px: int
    """As a viewer shows it."""
    height_px: int
    name: str
    """For people."""
    caption: str
    mask_sha256: str = ""
    """Of a picture of the same size whose bright parts are what is learnt; empty for all of it."""
    repeats: int = 1
    """How often it comes in an epoch."""
    weight: float = 1.0
    """By how much its loss counts."""
    flips: bool = False
    """Whether it is shown mirrored half of the times."""

    @property
    def files(self) -> tuple[str, ...]:
        """The digests of what it is made of."""
        return (self.sha256, self.mask_sha256) if self.mask_sha256 else (self.sha256,)


def dump(examples: Iterable[Example]) -> bytes:
    """The file's bytes: the same for the same examples."""
    lines = (json.dumps(asdict(one), ensure_ascii=True, sort_keys=True) for one in examples)
    return "".join(f"{line}\n" for line in lines).encode()


def load(data: bytes) -> tuple[Example, ...]:
    """The examples; raises InvalidRequest for a file that is none, naming the line."""
    examples = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            examples.append(_example(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError, InvalidRequest) as error:
            raise _refusal(f"line {number}: {error}") from None
    if not examples:
        raise _refusal("no examples")
    return tuple(examples)


def _example(values: Any) -> Example:
    example = Example(**values)
    for digest in example.files:
        digests.check(digest, "sha256")
    _count("size_bytes", example.size_bytes, 1 << 62)
    _count("width_px", example.width_px, _MOST_PIXELS)
    _count("height_px", example.height_px, _MOST_PIXELS)
    _count("repeats", example.repeats, MOST_REPEATS)
    for text in (example.name, example.caption):
        if not isinstance(text, str) or len(text) > _LONGEST_CAPTION:
            raise ValueError("a name or caption that is no text, or too long")
    if not isinstance(example.weight, float) or not 0 < example.weight < math.inf:
        raise ValueError(f"weight {example.weight}")
    if not isinstance(example.flips, bool):
        raise ValueError(f"flips {example.flips}")
    return example


def _count(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} {value}")


def _refusal(given: str) -> InvalidRequest:
    return InvalidRequest.given("spec.dataset", given, "a line for each picture", "DATASET")
