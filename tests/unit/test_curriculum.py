"""The order of samples, how they are shown, and what pictures are cut to."""

import hashlib
from collections import Counter

import pytest

from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import (
    Curriculum,
    Habits,
    Look,
    held_out,
    is_enough,
    size_px,
)


def _examples(count: int, **more: object) -> list[Example]:
    return [
        Example(hashlib.sha256(bytes([n])).hexdigest(), 1, 64, 64, str(n), f"caption {n}", **more)  # type: ignore[arg-type]
        for n in range(count)
    ]


def _looks(curriculum: Curriculum, steps: int) -> list[Look]:
    return [look for step in range(steps) for look in curriculum.batch(step)]


def test_every_example_comes_as_often_as_it_repeats_in_each_epoch_in_another_order() -> None:
    examples = [*_examples(8), Example("f" * 64, 1, 64, 64, "often", "x", repeats=2)]
    looks = _looks(Curriculum(examples, 3, Habits(4, (64,))), 10)  # four epochs of ten
    names = [look.example.name for look in looks]
    orders = [tuple(names[start : start + 10]) for start in range(0, 40, 10)]
    for order in orders:
        assert Counter(order) == {**{str(n): 1 for n in range(8)}, "often": 2}
    assert len(set(orders)) == 4
    assert all(look.caption == look.example.caption for look in looks)
    assert not any(look.is_flipped for look in looks)


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    habits = Habits(3, (64, 96), 0.5, shuffles_tags=True)
    examples = _examples(7, flips=True)
    asked = [Curriculum(examples, 5, habits).batch(step) for step in (2, 0, 30)]
    one = Curriculum(examples, 5, habits)
    assert asked == [one.batch(step) for step in (2, 0, 30)]
    assert asked[0] == one.batch(2)
    assert asked != [Curriculum(examples, 6, habits).batch(step) for step in (2, 0, 30)]


def test_captions_are_left_out_as_often_as_asked() -> None:
    looks = _looks(Curriculum(_examples(100), 0, Habits(10, (64,), caption_dropout=0.2)), 400)
    shown = Counter(bool(look.caption) for look in looks)
    assert 0.17 <= shown[False] / 4000 <= 0.23


def test_half_of_those_that_flip_are_flipped() -> None:
    looks = _looks(Curriculum(_examples(50, flips=True), 0, Habits(10, (64,))), 200)
    assert 0.45 <= sum(look.is_flipped for look in looks) / 2000 <= 0.55


def test_tags_change_places_behind_those_that_stay() -> None:
    [example] = _examples(1)
    tagged = Example(**{**_fields(example), "caption": "glorp, red,blue , green"})
    habits = Habits(1, (64,), shuffles_tags=True, fixed_tag_count=1)
    captions = {look.caption for look in _looks(Curriculum([tagged], 0, habits), 60)}
    assert len(captions) == 6
    for caption in captions:
        first, *rest = caption.split(", ")
        assert first == "glorp"
        assert sorted(rest) == ["blue", "green", "red"]


def test_each_example_has_every_side_in_turn() -> None:
    looks = _looks(Curriculum(_examples(4), 0, Habits(4, (64, 96, 128))), 3)
    sides = {look.example.name: set() for look in looks}  # type: ignore[var-annotated]
    for look in looks:
        sides[look.example.name].add(look.side_px)
    assert all(seen == {64, 96, 128} for seen in sides.values())
    assert len({look.side_px for look in looks[:4]}) > 1


def test_what_is_needed_is_named_once_in_the_order_of_its_need() -> None:
    curriculum = Curriculum(_examples(5), 0, Habits(2, (64,)))
    needed = list(curriculum.until(20))
    assert needed == list(dict.fromkeys(_looks(curriculum, 20)))
    assert len(needed) == 5


def _fields(example: Example) -> dict[str, object]:
    return {name: getattr(example, name) for name in Example.__slots__}


@pytest.mark.parametrize(
    ("picture", "side", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((300, 300), 1024, (1024, 1024)),
        ((3000, 2000), 1024, (1248, 832)),
        ((2000, 3000), 1024, (832, 1248)),
        ((160, 96), 128, (160, 96)),
        ((10000, 10), 512, (1024, 256)),  # no further than four to one
    ],
)
def test_pictures_are_cut_by_their_own_aspect(
    picture: tuple[int, int], side: int, expected: tuple[int, int]
) -> None:
    assert size_px(*picture, side, 16) == expected


def test_no_size_is_larger_than_asked_or_off_the_grid() -> None:
    for width in range(50, 4000, 333):
        for height in range(50, 4000, 333):
            cut = size_px(width, height, 768, 16)
            assert all(side % 16 == 0 for side in cut)
            assert 0.9 * 768**2 <= cut[0] * cut[1] <= 768**2


@pytest.mark.parametrize(("count", "share", "held"), [(20, 0.1, 2), (3, 0.01, 1), (2, 0.5, 1)])
def test_pictures_are_held_out_with_all_that_is_said_of_them(
    count: int, share: float, held: int
) -> None:
    examples = [*_examples(count), *_examples(count)]  # each has two captions
    learnt, kept = held_out(examples, 3, share)
    assert len({one.sha256 for one in kept}) == held
    assert len(kept) == 2 * held
    assert not {one.sha256 for one in kept} & {one.sha256 for one in learnt}
    assert len(learnt) + len(kept) == len(examples)
    assert (learnt, kept) == held_out(examples, 3, share)


def test_another_seed_holds_out_others_and_no_share_none() -> None:
    examples = _examples(40)
    assert held_out(examples, 1, 0.2) != held_out(examples, 2, 0.2)
    assert held_out(examples, 1, 0.0) == (examples, [])


@pytest.mark.parametrize(
    ("losses", "patience", "gain", "enough"),
    [
        ([3.0, 2.0, 1.0], 0, 0.0, False),
        ([1.0, 1.0], 2, 0.0, False),
        ([1.0, 1.0, 1.0], 2, 0.0, True),
        ([1.0, 1.1, 0.9], 2, 0.0, False),
        ([1.0, 1.1, 0.9], 2, 0.2, True),
        ([1.0, 0.9, 0.95, 0.92], 2, 0.0, True),
    ],
)
def test_it_is_enough_once_nothing_gets_better(
    losses: list[float], patience: int, gain: float, enough: bool
) -> None:
    assert is_enough(losses, patience, gain) == enough
