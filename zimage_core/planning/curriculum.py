"""What each step of a training learns from: a function of seed and place alone, fixed before
anything is prepared, so that neither a break nor the order of arrivals changes it."""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

_LARGEST_ASPECT = 4.0


@dataclass(frozen=True, slots=True)
class Place:
    """A sample's place in a training."""

    epoch: int
    example: int
    """Its number in the dataset."""
    has_caption: bool
    """Whether it is shown with its caption, and not with none."""


@dataclass(frozen=True, slots=True)
class Curriculum:
    """The order of samples."""

    seed: int
    example_count: int
    batch_size: int
    caption_dropout: float = 0.0

    def batch(self, step: int) -> tuple[Place, ...]:
        """The samples of a step, counted from 0: each example once in every epoch."""
        first = step * self.batch_size
        return tuple(self._place(number) for number in range(first, first + self.batch_size))

    def _place(self, number: int) -> Place:
        epoch, at = divmod(number, self.example_count)
        is_left_out = _share(self.seed, "dropout", number) < self.caption_dropout
        order = _order(self.seed, epoch, self.example_count)
        return Place(epoch, order[at], not is_left_out)


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


@lru_cache(4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(sorted(range(count), key=lambda example: _drawn(seed, "order", epoch, example)))


def _share(seed: int, *what: object) -> float:
    return int.from_bytes(_drawn(seed, *what)[:8], "little") / 2**64


def _drawn(seed: int, *what: object) -> bytes:
    return hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
