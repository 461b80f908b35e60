"""Scenes in words: the grammar that the demo model understands.

A caption is a pattern filled with phrases. What is marked as unseen here never stands in a caption
for training: evaluation asks whether the model understands it all the same.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from demo_model.world import NEW_SHAPE, Scene, Thing

SHAPE_WORDS = {
    "circle": ("circle", "disc", "disk"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
    NEW_SHAPE: ("glorp",),
}
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "yellow": ("yellow", "golden"),
    "orange": ("orange", "amber"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
}
SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
PLACE_WORDS = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "near the top", "at the upper edge"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "at the left side", "at the left edge"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "at the right side", "at the right edge"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom", "at the lower edge"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}

_ONE = (
    "{a} {thing} {place} on {b} {background} background",
    "{a} {thing} {place}, {background} background",
    "{b} {background} background with {a} {thing} {place}",
    "{background} background, {a} {thing} {place}",
    "{place} {a} {thing} on {background}",
    "a picture of {a} {thing} {place} on {background}",
)
_TWO = (
    "{a} {thing} {place} {c} {other} on {b} {background} background",
    "{a} {thing} {place} {c} {other}, {background} background",
    "{b} {background} background with {a} {thing} {place} {c} {other}",
    "{background} background, {a} {thing} {place} {c} {other}",
    "a picture of {a} {thing} {place} {c} {other} on {background}",
)
UNSEEN_ONE = (
    "{a} {thing} {place} against {b} {background} background",
    "on {background}, {a} {thing} {place}",
    "{background} background and {a} {thing} {place}",
)
UNSEEN_TWO = (
    "on {background}, {a} {thing} {place} {c} {other}",
    "{background} background and {a} {thing} {place} {c} {other}",
)
UNSEEN_PAIRINGS = frozenset(
    {
        *(("crimson", "disc"), ("scarlet", "hoop"), ("emerald", "box"), ("navy", "plus sign")),
        *(("golden", "rhombus"), ("amber", "disk"), ("violet", "hoop"), ("rose", "box")),
        *(("grey", "disc"), ("grey", "rhombus"), ("crimson", "plus sign"), ("violet", "disk")),
    }
)
"""Words for a colour and a shape that never meet in training, though each is met often."""

FILLER = (
    "a simple clean picture",
    "flat design, vector art",
    "high quality",
    "minimalist illustration",
    "no text, no border",
    "made by a child at school",
    "drawn on a rainy afternoon",
    "please draw this carefully",
    "poster for the kitchen",
    "as seen in a picture book",
    "sharp edges, plain surface",
    "for the cover of a small notebook",
    "neat and tidy",
    "nothing leans against it",
)
"""Every word of the unseen patterns stands in a seen pattern or here."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How a scene is put into words."""

    plain: bool = False
    """The first pattern and the first word for everything."""
    unseen: bool = False
    """Patterns that training never shows, and pairings of words wherever the scene has one."""
    omit: float = 0.0
    """The chance of each size, colour, place and background to be left out: the model chooses."""
    filler: float = 0.0
    """The chance of words that say nothing of the scene."""


PLAIN = Wording(plain=True)
TRAINING = Wording(omit=0.08, filler=0.15)


def caption(scene: Scene, wording: Wording, chance: random.Random) -> str:
    """The scene in words."""

    def left_out() -> bool:
        return chance.random() < wording.omit

    def word(words: Mapping[str, Sequence[str]], value: str) -> str:
        return words[value][0] if wording.plain else chance.choice(words[value])

    def phrase(thing: Thing) -> str:
        while True:
            colour, shape = word(COLOUR_WORDS, thing.colour), word(SHAPE_WORDS, thing.shape)
            if (colour, shape) not in UNSEEN_PAIRINGS:
                break
        if wording.unseen and (pairings := _unseen_pairings(thing)):
            colour, shape = chance.choice(pairings)
        size = "" if left_out() else word(SIZE_WORDS, thing.size)
        colour = "" if left_out() else colour
        return " ".join(part for part in (size, colour, shape) if part)

    things = [phrase(thing) for thing in scene.things]
    background = "" if left_out() else word(COLOUR_WORDS, scene.background)
    if scene.is_pair:
        patterns, place = _patterns(_TWO, UNSEEN_TWO, wording), word(RELATION_WORDS, scene.place)
    else:
        patterns = _patterns(_ONE, UNSEEN_ONE, wording)
        place = "" if left_out() else word(PLACE_WORDS, scene.place)
    pattern = patterns[0] if wording.plain else chance.choice(patterns)
    text = _filled(pattern, things, place, background)
    return _padded(text, chance) if chance.random() < wording.filler else text


def _unseen_pairings(thing: Thing) -> list[tuple[str, str]]:
    """The words for it that never meet in training, if there are any."""
    pairings = product(COLOUR_WORDS[thing.colour], SHAPE_WORDS[thing.shape])
    return [pairing for pairing in pairings if pairing in UNSEEN_PAIRINGS]


def _patterns(seen: Sequence[str], unseen: Sequence[str], wording: Wording) -> Sequence[str]:
    return unseen if wording.unseen else seen


def _filled(pattern: str, things: Sequence[str], place: str, background: str) -> str:
    if not background:  # the words around it go, too
        for part in (
            *(" on {b} {background} background", ", {background} background"),
            *("{b} {background} background with ", "{background} background, "),
            " on {background}",
        ):
            pattern = pattern.replace(part, "")
    text = pattern.format(
        a=_article(things[0]),
        b=_article(background or "x"),
        c=_article(things[-1]),
        thing=things[0],
        other=things[-1],
        place=place,
        background=background,
    )
    return " ".join(text.split()).replace(" ,", ",").strip(", ")


def _padded(text: str, chance: random.Random) -> str:
    words = ", ".join(chance.sample(FILLER, chance.randint(1, 4)))
    return f"{text}, {words}" if chance.random() < 0.6 else f"{words}, {text}"


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"
