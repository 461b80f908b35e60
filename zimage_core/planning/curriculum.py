"""What each step of a training learns from: a function of seed and place alone, fixed before
anything is prepared, so that neither a break nor the order of arrivals changes it."""

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zimage_core.formats.dataset_file import Example

_LARGEST_ASPECT = 4.0
_KEPT_ORDERS = 2
"""Of epochs: batches are prepared across their border."""


@dataclass(frozen=True, slots=True)
class Look:
    """An example as it is shown once."""

    example: Example
    caption: str
    side_px: int
    """It is cut to about so many pixels squared."""
    is_flipped: bool


@dataclass(frozen=True, slots=True)
class Habits:
    """How examples are shown."""

    batch_size: int
    sides_px: tuple[int, ...]
    """Each example has one after the other, an epoch each."""
    caption_dropout: float = 0.0
    """How often captions are left out."""
    shuffles_tags: bool = False
    """Whether what commas separate in a caption comes in another order each time."""
    fixed_tag_count: int = 0
    """How many at its beginning stay where they are."""


class Curriculum:
    """The order of samples."""

    def __init__(self, examples: Sequence[Example], seed: int, habits: Habits) -> None:
        self.examples = examples
        self._seed = seed
        self._habits = habits
        self._copies = [
            (number, copy)
            for number, example in enumerate(examples)
            for copy in range(example.repeats)
        ]
        self._orders: dict[int, list[int]] = {}
        self._ordering = threading.Lock()
        """Held while an epoch is put in order, which takes a while where it is long."""

    def batch(self, step: int) -> tuple[Look, ...]:
        """The samples of a step, counted from 0: in every epoch each example as often as it
        repeats."""
        first = step * self._habits.batch_size
        return tuple(self._look(first + index) for index in range(self._habits.batch_size))

    def until(self, step_count: int) -> Iterator[Look]:
        """All that come in so many steps, each look once, in the order in which they are needed."""
        seen: set[Look] = set()
        for step in range(step_count):
            for look in self.batch(step):
                if look not in seen:
                    seen.add(look)
                    yield look

    def _look(self, number: int) -> Look:
        epoch, at = divmod(number, len(self._copies))
        index = self._order(epoch)[at]
        example = self.examples[index]
        sides = self._habits.sides_px
        return Look(
            example=example,
            caption=self._caption(example.caption, number),
            side_px=sides[(epoch + index) % len(sides)],
            is_flipped=example.flips and self._share("flip", number) < 0.5,
        )

    def _caption(self, caption: str, number: int) -> str:
        if self._share("dropout", number) < self._habits.caption_dropout:
            return ""
        if not self._habits.shuffles_tags:
            return caption
        tags = [tag.strip() for tag in caption.split(",")]
        first = self._habits.fixed_tag_count
        order = sorted(range(first, len(tags)), key=lambda tag: self._drawn("tags", number, tag))
        return ", ".join([*tags[:first], *(tags[tag] for tag in order)])

    def _order(self, epoch: int) -> list[int]:
        """The numbers of examples."""
        with self._ordering:
            if epoch not in self._orders:
                while len(self._orders) >= _KEPT_ORDERS:
                    del self._orders[min(self._orders)]
                copies = sorted(self._copies, key=lambda copy: self._drawn("order", epoch, *copy))
                self._orders[epoch] = [number for number, _ in copies]
            return self._orders[epoch]

    def _share(self, *what: object) -> float:
        return int.from_bytes(self._drawn(*what)[:8], "little") / 2**64

    def _drawn(self, *what: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (self._seed, *what))).encode()).digest()


def held_out(
    examples: Sequence[Example], seed: int, share: float
) -> tuple[list[Example], list[Example]]:
    """What is learnt, and what is kept from that: about such a share of the pictures, one at least
    of several; all examples of a picture are on one side."""
    pictures = sorted({example.sha256 for example in examples}, key=lambda one: _draw(seed, one))
    count = min(max(1, round(share * len(pictures))), len(pictures) - 1) if share else 0
    kept = set(pictures[:count])
    return (
        [example for example in examples if example.sha256 not in kept],
        [example for example in examples if example.sha256 in kept],
    )


def _draw(seed: int, sha256: str) -> bytes:
    return hashlib.sha256(f"{seed}/held out/{sha256}".encode()).digest()


def best(losses: Sequence[float | None]) -> int:
    """The place of the least, the latest of equals; of those without, too, where there are no
    others."""
    comparable = [math.inf if loss is None else loss for loss in losses]
    return min(reversed(range(len(losses))), key=comparable.__getitem__)


def is_enough(losses: Sequence[float], patience: int, least_gain: float) -> bool:
    """Whether the last so many lost no less than the best before them."""
    if not patience or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience]) - least_gain


def epoch_length(examples: Sequence[Example]) -> int:
    """How many samples an epoch has."""
    return sum(example.repeats for example in examples)


def size_px(width_px: int, height_px: int, side_px: int, multiple: int) -> tuple[int, int]:
    """Width and height that a picture is cut to: of all of about so many pixels squared, by the
    model's multiple, those nearest to its own aspect."""
    aspect = min(max(width_px / height_px, 1 / _LARGEST_ASPECT), _LARGEST_ASPECT)
    area = side_px**2
    longest = math.floor(side_px * math.sqrt(_LARGEST_ASPECT))
    sizes = [
        (width, max(multiple, area // width // multiple * multiple))
        for width in range(multiple, max(longest, multiple) + 1, multiple)
    ]
    return min(sizes, key=lambda size: (_apart(size, aspect), -size[0] * size[1]))


def _apart(size: tuple[int, int], aspect: float) -> float:
    return abs(math.log(size[0] / size[1] / aspect))
