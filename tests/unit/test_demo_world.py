"""The demo model's world: what is drawn, how it is said, and that the checker can tell."""

import random
import re

import pytest

from demo_model import captions, checker, drawing, world
from demo_model.captions import PLAIN, TRAINING, Wording

SCENES = 60


def _scenes(chance: random.Random, *, held_out: bool) -> list[world.Scene]:
    return [world.any_scene(chance, held_out=held_out) for _ in range(SCENES)]


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
        other = world.changed(scene, attribute, chance)
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
        assert all(  # colours of things and shapes are never left out
            any(word in text for word in captions.SHAPE_WORDS[thing.shape])
            for thing in scene.things
        )
