"""The demo model's world: what is drawn, how it is said, and that the checker can tell."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo_model import captions, checker, drawing, world
from demo_model.captions import PLAIN, TRAINING, Wording
from demo_model.drawing import Pixels, Placed
from demo_model.recipe import canvases
from demo_model.world import Scene, Thing

SCENES = 60


def _scenes(chance: random.Random, *, held_out: bool) -> list[world.Scene]:
    return [world.any_scene(chance, held_out=held_out) for _ in range(SCENES)]


def _changed(scene: world.Scene, attribute: str, chance: random.Random) -> world.Scene:
    """The same scene with another value of one attribute: "background", "place", or "shape",
    "colour" or "size" of one of its things."""
    if attribute == "background":
        used = {scene.background, *(thing.colour for thing in scene.things)}
        return replace(scene, background=_other(world.BACKGROUNDS, used, chance))
    if attribute == "place":
        places = world.RELATIONS if scene.is_pair else world.POSITIONS
        return replace(scene, place=_other(places, {scene.place}, chance))
    index = chance.randrange(len(scene.things))
    things = list(scene.things)
    values = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "size": tuple(world.SIZES)}[
        attribute
    ]
    used = {getattr(things[index], attribute)}
    if attribute == "colour":
        used |= {scene.background, *(thing.colour for thing in things)}
    if attribute == "size" and any(t.size == "large" for t in things if t != things[index]):
        used.add("large")
    things[index] = replace(things[index], **{attribute: _other(values, used, chance)})
    return replace(scene, things=tuple(things))


def _other(values: Sequence[str], used: set[str], chance: random.Random) -> str:
    return chance.choice([value for value in values if value not in used])


@pytest.mark.parametrize("size", world.CANVASES)
def test_the_checker_passes_what_is_true(size: tuple[int, int]) -> None:
    chance = random.Random(f"true {size}")
    scenes = _scenes(chance, held_out=True)
    passed = [all(checker.check(drawing.draw(s, size, chance), s).values()) for s in scenes]
    assert sum(passed) >= 0.98 * SCENES


@pytest.mark.parametrize("attribute", ["background", "place", "shape", "colour", "size"])
def test_the_checker_fails_what_is_changed_in_one_thing(attribute: str) -> None:
    chance = random.Random(attribute)
    failed = 0
    for scene in _scenes(chance, held_out=True):
        other = _changed(scene, attribute, chance)
        found = checker.check(drawing.draw(other, (128, 128), chance), scene)
        failed += not found[attribute]
    assert failed >= 0.98 * SCENES


def test_a_missing_or_an_extra_thing_is_counted() -> None:
    chance = random.Random(3)
    pair = world.any_scene(chance, held_out=False, pairs=1.0)
    one = world.Scene(pair.background, pair.things[:1], "center")
    for shown, asked in ((pair, one), (one, pair)):
        found = checker.check(drawing.draw(shown, (128, 128), chance), asked)
        assert not found["count"]
        assert found["background"]


def _wrong_pictures() -> dict[str, Pixels]:
    """Of a large red circle on white, with one fault each."""
    red, white = world.COLOURS["red"], world.COLOURS["white"]
    circle = drawing.mask(Placed("circle", red, 64, 64, 26, 0), (128, 128))
    true = drawing.compose(white, [(circle, red)])
    ys, xs = np.mgrid[:128, :128] - 63.5
    angle = np.arctan2(ys, xs)
    half = circle * (xs > 12)
    ellipse = (xs / 32) ** 2 + (ys / 21) ** 2 < 1
    wobbly = np.hypot(xs, ys) < 26 * (1 + 0.2 * np.cos(7 * angle))
    specked = true.copy()
    specked[4:8, 4:8] = world.COLOURS["blue"]
    shaded = true - (np.abs(xs)[..., None] * (1 - circle[..., None])).astype(np.uint8)
    line = np.full_like(true, 136)
    line[60:62, 20:80] = np.resize([(216, 136, 136), (136, 216, 136)], (60, 3))
    return {
        "two colours": drawing.compose(white, [(circle, red), (half, world.COLOURS["orange"])]),
        "an ellipse": drawing.compose(white, [(ellipse.astype(np.float32), red)]),
        "a flower": drawing.compose(white, [(wobbly.astype(np.float32), red)]),
        "a speck": specked,
        "a shaded background": shaded,
        "no background": np.where(circle[..., None] > 0, true, np.uint8([0, 255, 255])),
        "nothing": np.full_like(true, 250),
        "hardly anything": line,
        "noise": np.random.default_rng(0).integers(0, 255, true.shape).astype(np.uint8),
    }


@pytest.mark.parametrize("fault", _wrong_pictures())
def test_the_checker_fails_what_no_scene_looks_like(fault: str) -> None:
    asked = Scene("white", (Thing("circle", "red", "large"),), "center")
    picture = _wrong_pictures()[fault]
    assert not all(checker.check(picture, asked).values())
    assert all(0 < decibels < 80 for decibels in checker.sharpness(picture))


def test_what_a_model_blurs_is_less_sharp() -> None:
    chance = random.Random(6)
    scene = world.any_scene(chance, held_out=True)
    true = drawing.draw(scene, (128, 128), chance)
    blurred = np.asarray(Image.fromarray(true).filter(ImageFilter.GaussianBlur(1.5)))
    assert max(checker.sharpness(blurred)) < 30 < min(checker.sharpness(true))


def test_what_is_held_out_is_never_trained_on() -> None:
    chance = random.Random(5)
    pairs = {(shape, colour) for shape in world.SHAPES for colour in world.COLOURS}
    held_out = {pair for pair in pairs if world.is_held_out(*pair)}
    assert {shape for shape, _ in held_out} == set(world.SHAPES)
    trained = {
        (thing.shape, thing.colour)
        for _ in range(20)
        for scene in _scenes(chance, held_out=False)
        for thing in scene.things
    }
    assert trained == pairs - held_out
    for scene in _scenes(chance, held_out=True):
        assert any((t.shape, t.colour) in held_out for t in scene.things)


def test_not_even_the_autoencoder_sees_what_is_held_out() -> None:
    chance = random.Random(7)
    for _ in range(3000):
        for thing, _ in canvases.closeup(chance).layers:
            distances = {name: math.dist(rgb, thing.rgb) for name, rgb in world.COLOURS.items()}
            nearest = min(distances, key=distances.__getitem__)
            assert not (thing.shape and world.is_held_out(thing.shape, nearest))


def test_a_plain_caption_names_everything() -> None:
    chance = random.Random(7)
    for scene in _scenes(chance, held_out=False):
        text = captions.caption(scene, PLAIN, chance)
        named = [scene.background, *(w for t in scene.things for w in (t.shape, t.colour, t.size))]
        assert all(word in text for word in named), (text, named)
        place = captions.RELATION_WORDS if scene.is_pair else captions.PLACE_WORDS
        assert place[scene.place][0] in text


def test_training_shows_no_unseen_pairing_and_every_word_of_the_unseen() -> None:
    chance = random.Random(11)
    seen = " ".join(
        captions.caption(scene, wording, chance)
        for wording in (TRAINING, Wording(filler=1.0))
        for _ in range(15)
        for scene in _scenes(chance, held_out=False)
    )
    for colour, shape in captions.UNSEEN_PAIRINGS:
        assert f"{colour} {shape}" not in seen
    assert not re.search(r"\bagainst an? \w+ background", seen)
    words = set(re.findall(r"[a-z-]+", seen))
    unseen = [
        captions.caption(scene, Wording(unseen=True), chance)
        for scene in _scenes(chance, held_out=True)
    ]
    assert set(re.findall(r"[a-z-]+", " ".join(unseen))) <= words


def test_what_is_left_out_leaves_a_sentence() -> None:
    chance = random.Random(13)
    for scene in _scenes(chance, held_out=False):
        text = captions.caption(scene, Wording(omit=0.7), chance)
        assert text == " ".join(text.split()).strip(" ,")
        assert "{" not in text
        assert all(  # shapes are never left out
            any(word in text for word in captions.SHAPE_WORDS[thing.shape])
            for thing in scene.things
        )
