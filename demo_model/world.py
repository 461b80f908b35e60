"""What the demo model can draw: scenes of one or two things on a plain background.

Every word of the world stands here, for captions, drawing, the checker and the recipe.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
NEW_SHAPE = "arrow"
"""One that the demo model was never shown: what it can be taught (`make demo-train`)."""
COLOURS = {
    "red": (222, 36, 36),
    "green": (36, 160, 60),
    "blue": (36, 80, 226),
    "yellow": (248, 218, 48),
    "orange": (246, 132, 22),
    "purple": (130, 44, 172),
    "pink": (248, 150, 192),
    "black": (18, 18, 18),
    "white": (250, 250, 250),
    "gray": (136, 136, 136),
}
"""What things are painted in, as 8-bit RGB."""
BACKGROUNDS = ("white", "black", "gray", "blue", "green", "yellow", "pink", "red")
SIZES = {"small": 12.5, "medium": 18.0, "large": 26.0}
"""Radii in pixels, whatever the picture's size."""
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
"""Where a single thing may stand: the cells of a grid of three by three, by rows."""
RELATIONS = ("left of", "right of", "above", "below")
"""How the first of two things stands to the second."""
CANVASES = ((128, 128), (192, 128), (128, 192))
"""Width and height of the pictures that the model was trained for."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows."""

    background: str
    things: tuple[Thing, ...]
    place: str
    """Of one thing its position; of two the relation of the first to the second."""

    @property
    def is_pair(self) -> bool:
        """Whether there are two things."""
        return len(self.things) == 2


def is_held_out(shape: str, colour: str) -> bool:
    """Whether no picture with a thing of this shape in this colour is ever trained on."""
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour)) % 5 == 0


def any_scene(chance: random.Random, *, held_out: bool, pairs: float = 0.4) -> Scene:
    """A scene for training, or one with a thing that was held out from it. Of pairs with one, the
    other thing may be any."""
    background = chance.choice(BACKGROUNDS)
    first = _any_thing(chance, [background], held_out=held_out)
    if chance.random() >= pairs:
        return Scene(background, (first,), chance.choice(POSITIONS))
    is_both = held_out and chance.random() < 0.1
    second = _any_thing(chance, [background, first.colour], held_out=is_both)
    while first.size == second.size == "large":  # no canvas has room for them
        second = replace(second, size=chance.choice(list(SIZES)))
    things = (first, second) if chance.random() < 0.5 else (second, first)
    return Scene(background, things, chance.choice(RELATIONS))


def _any_thing(chance: random.Random, colours_used: Sequence[str], *, held_out: bool) -> Thing:
    while True:
        shape, colour = chance.choice(SHAPES), chance.choice(list(COLOURS))
        if colour not in colours_used and is_held_out(shape, colour) == held_out:
            return Thing(shape, colour, chance.choice(list(SIZES)))
