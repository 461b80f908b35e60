"""Scenes as pixels, antialiased: what the demo model learns from and is measured against."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from demo_model import world
from demo_model.world import Scene

_OVERSAMPLING = 4
_PLACE_JITTER, _SIZE_JITTER = 0.02, 0.03
_COLOUR_JITTER = 5
"""How far things may be from their ideal: in sides, radii and 8-bit levels. They stand upright."""
_GRID = (0.24, 0.5, 0.76)
_PAIR = (0.24, 0.76)
_PAIR_JITTER = 0.015
_ACROSS = 0.02
_ROOM = 1.25
"""The extent of the widest shape, in radii."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Mask = np.ndarray[Any, np.dtype[np.float32]]
Ring = tuple[tuple[tuple[float, float], ...], bool]
"""A polygon in radii, and whether it fills or cuts."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing with its geometry, in pixels and radians."""

    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    turn: float


def draw(scene: Scene, size: tuple[int, int], chance: random.Random) -> Pixels:
    """The scene as [height, width, 3], every detail that the words leave open left to chance."""
    things = placed(scene, size, chance)
    masks = [mask(thing, size) for thing in things]
    return compose(
        jittered(scene.background, chance), zip(masks, (t.rgb for t in things), strict=True)
    )


def placed(scene: Scene, size: tuple[int, int], chance: random.Random) -> list[Placed]:
    """The scene's things where they stand in a picture of this size."""
    found = []
    for index, thing in enumerate(scene.things):
        radius = world.SIZES[thing.size] * (1 + chance.uniform(-1, 1) * _SIZE_JITTER)
        across, down = _spot(scene, index, chance)
        room = _ROOM * radius + 1
        found.append(
            Placed(
                shape=thing.shape,
                rgb=jittered(thing.colour, chance),
                x=min(max(across * size[0], room), size[0] - room),
                y=min(max(down * size[1], room), size[1] - room),
                radius=radius,
                turn=0.0,
            )
        )
    return found


def mask(thing: Placed, size: tuple[int, int]) -> Mask:
    """How much of each pixel the thing covers, [height, width] from 0 to 1."""
    width, height = size
    image = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    canvas = ImageDraw.Draw(image)
    cosine, sine = math.cos(thing.turn) * thing.radius, math.sin(thing.turn) * thing.radius
    for points, fills in outline(thing.shape):
        turned = (
            (thing.x + cosine * x - sine * y, thing.y + sine * x + cosine * y) for x, y in points
        )
        scaled = [(_OVERSAMPLING * x - 0.5, _OVERSAMPLING * y - 0.5) for x, y in turned]
        canvas.polygon(scaled, fill=255 * fills)
    return np.asarray(image.reduce(_OVERSAMPLING), np.float32) / np.float32(255)


def compose(
    background: tuple[int, int, int], layers: Iterable[tuple[Mask, tuple[int, int, int]]]
) -> Pixels:
    """Coloured masks over a background."""
    return np.asarray((painted(background, layers) + 0.5).clip(0, 255), np.uint8)


def painted(
    background: tuple[float, ...], layers: Iterable[tuple[Mask, tuple[int, int, int]]]
) -> Any:
    """The same before it is rounded."""
    picture: Any = np.array(background, np.float32)
    for cover, rgb in layers:
        opaque = cover[..., None]
        picture = picture * (1 - opaque) + opaque * np.array(rgb, np.float32)
    return picture


def jittered(colour: str, chance: random.Random) -> tuple[int, int, int]:
    """A shade of the colour that nobody would call another."""
    levels = (
        min(255, max(0, level + chance.randint(-_COLOUR_JITTER, _COLOUR_JITTER)))
        for level in world.COLOURS[colour]
    )
    red, green, blue = levels
    return red, green, blue


def _spot(scene: Scene, index: int, chance: random.Random) -> tuple[float, float]:
    """Where a thing's middle is, as shares of width and height."""
    if not scene.is_pair:
        row, column = divmod(world.POSITIONS.index(scene.place), 3)
        jitter = [chance.uniform(-1, 1) * _PLACE_JITTER for _ in range(2)]
        return _GRID[column] + jitter[0], _GRID[row] + jitter[1]
    is_first = scene.place in ("left of", "above")
    along = _PAIR[0 if is_first == (index == 0) else 1] + chance.uniform(-1, 1) * _PAIR_JITTER
    across = 0.5 + chance.uniform(-1, 1) * _ACROSS
    return (along, across) if scene.place in ("left of", "right of") else (across, along)


@cache
def outline(shape: str) -> tuple[Ring, ...]:
    """The polygons of a shape of radius 1 around its middle; y points down."""
    arm, waist = 1.08, 0.38
    corner = [(waist, -arm), (waist, -waist), (arm, -waist)]
    outlines: dict[str, tuple[Ring, ...]] = {
        "circle": ((_circle(1.0), True),),
        "square": (_ring([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),),
        "triangle": (_ring([(0, -1.15), (1.12, 0.8), (-1.12, 0.8)]),),
        "star": (_ring(_spikes(5, 1.25, 0.53)),),
        "ring": ((_circle(1.08), True), (_circle(0.6), False)),
        "cross": (_ring([p for turns in range(4) for p in _quarter_turns(corner, turns)]),),
        "heart": (_ring(_heart()),),
        "diamond": (_ring([(0, -1.25), (0.95, 0), (0, 1.25), (-0.95, 0)]),),
        world.NEW_SHAPE: (_ring(_arrow()),),
    }
    return outlines[shape]


def _ring(points: Sequence[tuple[float, float]]) -> Ring:
    return tuple(points), True


def _circle(radius: float) -> tuple[tuple[float, float], ...]:
    angles = (2 * math.pi * step / 64 for step in range(64))
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


def _spikes(count: int, outer: float, inner: float) -> list[tuple[float, float]]:
    radii = [outer, inner] * count
    angles = (math.pi * step / count for step in range(2 * count))
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _quarter_turns(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    for _ in range(count):
        points = [(-y, x) for x, y in points]
    return list(points)


def _arrow() -> list[tuple[float, float]]:
    """Upwards."""
    half = [(0, -1.25), (1.1, 0.05), (0.42, 0.05), (0.42, 1.15)]
    return [*half, *((-x, y) for x, y in reversed(half[1:]))]


def _heart() -> list[tuple[float, float]]:
    points = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 15, -(y + 2.3) / 15))
    return points
