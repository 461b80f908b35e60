"""Whether a picture shows a scene: looked at, not guessed from the prompt.

The background is the border's colour. What differs from it falls into connected pieces; each is
compared with every shape, drawn by the same code as the training pictures, at its own place, area
and turn. No learned part, so that it cannot share the model's mistakes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from demo_model import drawing, world
from demo_model.drawing import Mask, Pixels, Placed
from demo_model.world import Scene, Thing

ATTRIBUTES = ("background", "count", "shape", "colour", "size", "place")

_DIFFERENT = 42.0
"""The distance in RGB from which a pixel is no background."""
_FAR_COLOUR = 60.0
"""The distance from which a colour has no name."""
_LEAST_PIXELS = 8
"""Of a thing, however small; a true one has four hundred."""
_LEAST_OVERLAP = 0.85
"""Intersection over union of a piece and its best shape; of true things it is 0.93 at least."""
_LIKELY_OVERLAP = 0.6
"""From which a piece may have been meant to be a shape."""
_ALIKE = 40.0
_MOSTLY = 0.9
"""The share of a thing or of the background that must be like its median, within so much in RGB."""
_TURNS = (-0.09, -0.045, 0.0, 0.045, 0.09)
_MARGIN = 6
"""Of a thing's surroundings, in pixels, in which it is moved about."""
_CELLS = (0.37, 0.63)
_LEAST_DISTANCE = 0.2
"""Of two things along their relation, in sides."""
_SIZE_BORDERS = {"small": 15.2, "medium": 22.0}

_PALETTE = np.array(list(world.COLOURS.values()), np.float32)

Rgb = tuple[int, int, int]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Piece = np.ndarray[Any, np.dtype[np.bool_]]
"""Which pixels belong to a thing."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A thing found in a picture."""

    thing: Thing
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture shows."""

    background: str
    """Empty for a colour that has no name."""
    things: tuple[Seen, ...]


def check(picture: Pixels, scene: Scene) -> dict[str, bool]:
    """Attribute by attribute, whether the picture shows the scene; two things need both right."""
    seen = look(picture, tuple(dict.fromkeys([*world.SHAPES, *(t.shape for t in scene.things)])))
    found = dict.fromkeys(ATTRIBUTES, False)
    found["background"] = seen.background == scene.background
    found["count"] = len(seen.things) == len(scene.things)
    if found["count"]:
        pairs = list(zip(_matched(seen, scene), scene.things, strict=True))
        for name in ("shape", "colour", "size"):
            found[name] = all(getattr(s.thing, name) == getattr(t, name) for s, t in pairs)
        found["place"] = _place([s for s, _ in pairs], picture.shape) == scene.place
    return found


def look(picture: Pixels, shapes: Sequence[str] = world.SHAPES) -> Look:
    """The background and the things, of these shapes, the largest first."""
    levels, background, pieces = _parts(picture)
    things = [_seen(levels, background, piece, shapes) for piece in pieces]
    empty = ~_grown(_grown(np.logical_or.reduce([np.zeros(levels.shape[:2], bool), *pieces])))
    return Look(_uniform_colour_name(levels[empty], background), tuple(things))


def sharpness(picture: Pixels) -> list[float]:
    """For each thing, how close it is to its own best-fitting rendering, in decibels."""
    levels, background, pieces = _parts(picture)
    return [_sharpness(levels, background, piece) for piece in pieces if _core(piece).any()]


def meant(picture: Pixels, scene: Scene) -> tuple[Rgb, list[Placed]] | None:
    """The scene as the picture may have meant it: its background, and its shapes where and as they
    fit best. None for a picture that shows another scene."""
    found = check(picture, scene)
    if not (found["background"] and found["count"] and found["size"] and found["place"]):
        return None
    levels, background, pieces = _parts(picture)
    things: list[Placed] = []
    for seen, thing in zip(_matched(look(picture), scene), scene.things, strict=True):
        piece = min(pieces, key=lambda piece: _distance(piece, seen))
        colour, cover = _painted(levels, background, piece)
        fits = (fit for fit in _fits(cover) if fit[1].shape == thing.shape)
        overlap, fitted = max(fits, key=lambda fit: fit[0])
        if overlap < _LIKELY_OVERLAP or _colour_name(colour) != thing.colour:
            return None
        things.append(replace(_settled(fitted, cover), rgb=_rgb(colour)))
    return _rgb(background), things


def _distance(piece: Piece, seen: Seen) -> float:
    rows, columns = np.nonzero(piece)
    return math.hypot(columns.mean() - seen.x, rows.mean() - seen.y)


def _rgb(colour: Floats) -> Rgb:
    red, green, blue = (round(float(level)) for level in colour)
    return red, green, blue


def _parts(picture: Pixels) -> tuple[Floats, Floats, list[Piece]]:
    levels = picture.astype(np.float32)
    border = np.concatenate([levels[:2], levels[-2:]]).reshape(-1, 3)
    sides = np.concatenate([levels[:, :2], levels[:, -2:]], axis=1).reshape(-1, 3)
    background = np.median(np.concatenate([border, sides]), axis=0)
    differs = np.linalg.norm(levels - background, axis=2) > _DIFFERENT
    return levels, background, _pieces(differs)


def _matched(seen: Look, scene: Scene) -> tuple[Seen, ...]:
    """The things in the order of the scene's, as they fit best."""

    def score(things: tuple[Seen, ...]) -> int:
        pairs = zip(things, scene.things, strict=True)
        return sum((s.thing.shape == t.shape) + 2 * (s.thing.colour == t.colour) for s, t in pairs)

    return max(seen.things, seen.things[::-1], key=score)


def _place(things: list[Seen], shape: tuple[int, ...]) -> str:
    height, width = shape[:2]
    if len(things) == 1:
        row, column = (
            sum(middle > border * side for border in _CELLS)
            for middle, side in ((things[0].y, height), (things[0].x, width))
        )
        return world.POSITIONS[3 * row + column]
    across = (things[1].x - things[0].x) / width
    down = (things[1].y - things[0].y) / height
    if max(abs(across), abs(down)) < _LEAST_DISTANCE:
        return ""
    if abs(across) > abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


def _seen(levels: Floats, background: Floats, piece: Piece, shapes: Sequence[str]) -> Seen:
    core = _core(piece)
    if not core.any():  # debris
        y, x = (float(where.mean()) for where in np.nonzero(piece))
        return Seen(Thing("", "", ""), x, y)
    colour, cover = _painted(levels, background, piece)
    overlap, fitted = max(_fits(cover, shapes), key=lambda fit: fit[0])
    size = next((name for name, top in _SIZE_BORDERS.items() if fitted.radius < top), "large")
    shape = fitted.shape if overlap > _LEAST_OVERLAP else ""
    thing = Thing(shape, _uniform_colour_name(levels[core], colour), size)
    return Seen(thing, fitted.x, fitted.y)


def _painted(levels: Floats, background: Floats, piece: Piece) -> tuple[Floats, Mask]:
    """A thing's colour, and how much of each pixel it covers."""
    colour = np.median(levels[_core(piece)], axis=0)
    towards = colour - background
    share = ((levels - background) @ towards / (towards @ towards + 1e-6)).clip(0, 1)
    return colour, share * _grown(piece)


def _sharpness(levels: Floats, background: Floats, piece: Piece) -> float:
    """How close a thing is to its own best rendering, around its edges and within: in decibels."""
    colour, cover = _painted(levels, background, piece)
    _, fitted = max(_fits(cover), key=lambda fit: fit[0])
    drawn = _drawn(_settled(fitted, cover), cover.shape)
    near = _grown(_grown(piece)) | (drawn > 0)
    picture = background + drawn[..., None] * (colour - background)
    squares = float(((levels - picture)[near] ** 2).mean())
    return 10 * math.log10(255**2 / max(squares, 1e-3))


def _settled(thing: Placed, cover: Mask) -> Placed:
    """The thing moved, resized and turned a little, until it covers best."""
    rows, columns = np.nonzero(cover > 0)
    top, left = max(0, rows.min() - _MARGIN), max(0, columns.min() - _MARGIN)
    part = cover[top : rows.max() + _MARGIN + 1, left : columns.max() + _MARGIN + 1]
    best = replace(thing, x=thing.x - left, y=thing.y - top)
    error = _error(best, part)
    for step in (0.5, 0.25, 0.1, 0.05, 0.02):
        for _ in range(3):
            for moved in _moved(best, step):
                tried = _error(moved, part)
                if tried < error:
                    best, error = moved, tried
    return replace(best, x=best.x + left, y=best.y + top)


def _moved(thing: Placed, step: float) -> Iterator[Placed]:
    """The thing a little aside, larger, smaller or turned; a step is in pixels at its edge."""
    for sign in (-step, step):
        yield replace(thing, x=thing.x + sign)
        yield replace(thing, y=thing.y + sign)
        yield replace(thing, radius=thing.radius + sign)
        yield replace(thing, turn=thing.turn + sign / thing.radius)


def _error(thing: Placed, cover: Mask) -> float:
    return float(((_drawn(thing, cover.shape) - cover) ** 2).sum())


def _fits(cover: Mask, shapes: Sequence[str] = world.SHAPES) -> Iterator[tuple[float, Placed]]:
    """Every shape and turn with the same area and middle as the piece, and how well it covers."""
    rows, columns = np.nonzero(cover > 0)
    top, left = rows.min(), columns.min()
    part = cover[top : rows.max() + 1, left : columns.max() + 1]
    height, width = part.shape
    ys, xs = np.mgrid[:height, :width].astype(np.float32) + 0.5
    area = float(part.sum())
    x, y = float((part * xs).sum() / area), float((part * ys).sum() / area)
    for shape in shapes:
        for turn in _TURNS:
            unit_area, unit_x, unit_y = _moments(shape, turn)
            radius = math.sqrt(area / unit_area)
            at = Placed(shape, (0, 0, 0), x - unit_x * radius, y - unit_y * radius, radius, turn)
            drawn = _drawn(at, part.shape)
            overlap = float(np.minimum(part, drawn).sum() / np.maximum(part, drawn).sum())
            moved = Placed(shape, at.rgb, at.x + left, at.y + top, radius, turn)
            yield overlap, moved


def _drawn(thing: Placed, shape: tuple[int, ...]) -> Mask:
    return drawing.mask(thing, (shape[1], shape[0]))


@cache
def _moments(shape: str, turn: float) -> tuple[float, float, float]:
    """The area and the middle of a shape of radius 1."""
    side, radius = 160, 50.0
    drawn = drawing.mask(Placed(shape, (0, 0, 0), side / 2, side / 2, radius, turn), (side, side))
    ys, xs = np.mgrid[:side, :side] + 0.5 - side / 2
    area = float(drawn.sum())
    x, y = float((drawn * xs).sum() / area), float((drawn * ys).sum() / area)
    return area / radius**2, x / radius, y / radius


def _pieces(differs: Piece) -> list[Piece]:
    """The connected parts of some size, the largest first."""
    left = differs.copy()
    pieces: list[Piece] = []
    while left.any():
        piece = np.zeros_like(left)
        piece[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = _grown(_grown(piece) & left) & left
            if (grown == piece).all():
                break
            piece = grown
        left &= ~piece
        if piece.sum() >= _LEAST_PIXELS:
            pieces.append(piece)
    return sorted(pieces, key=lambda piece: -int(piece.sum()))


def _grown(piece: Piece) -> Piece:
    """With every neighbour."""
    padded = np.pad(piece, 1)
    wide = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return np.asarray(wide[:-2] | wide[1:-1] | wide[2:])


def _shrunk(piece: Piece) -> Piece:
    return np.asarray(~_grown(~piece))


def _core(piece: Piece) -> Piece:
    """Without its edge, whose pixels are half background."""
    return piece & _shrunk(piece)


def _uniform_colour_name(pixels: Floats, middle: Floats) -> str:
    """Empty where the pixels are not all of one colour."""
    alike = np.linalg.norm(pixels - middle, axis=1) < _ALIKE
    return _colour_name(middle) if alike.sum() >= max(1, _MOSTLY * len(alike)) else ""


def _colour_name(rgb: Floats) -> str:
    names = list(world.COLOURS)
    distances = np.linalg.norm(_PALETTE - rgb, axis=1)
    nearest = int(distances.argmin())
    return names[nearest] if distances[nearest] < _FAR_COLOUR else ""
