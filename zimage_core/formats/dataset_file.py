"""The dataset file: pictures by their digests, and what they show, a JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from zimage_core import digests
from zimage_core.errors import InvalidRequest

MEDIA_TYPE = "application/jsonl"

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
        except (ValueError, TypeError, KeyError, InvalidRequest) as error:
            raise _refusal(f"line {number}: {error}") from None
    if not examples:
        raise _refusal("no examples")
    return tuple(examples)


def _example(values: Any) -> Example:
    example = Example(**values)
    digests.check(example.sha256, "sha256")
    if not isinstance(example.size_bytes, int) or example.size_bytes < 1:
        raise ValueError(f"size_bytes {example.size_bytes}")
    for side in (example.width_px, example.height_px):
        if not isinstance(side, int) or not 1 <= side <= _MOST_PIXELS:
            raise ValueError(f"a side of {side} pixels")
    for text in (example.name, example.caption):
        if not isinstance(text, str) or len(text) > _LONGEST_CAPTION:
            raise ValueError("a name or caption that is no text, or too long")
    return example


def _refusal(given: str) -> InvalidRequest:
    return InvalidRequest.given("spec.dataset", given, "a line for each picture", "DATASET")
