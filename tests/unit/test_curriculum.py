"""The order of samples, and what pictures are cut to."""

from collections import Counter

import pytest

from zimage_core.planning.curriculum import Curriculum, size_px


def test_every_example_comes_once_in_each_epoch_in_another_order() -> None:
    curriculum = Curriculum(seed=3, example_count=10, batch_size=4)
    places = [place for step in range(10) for place in curriculum.batch(step)]  # four epochs
    orders = [[place.example for place in places if place.epoch == epoch] for epoch in range(4)]
    for order in orders:
        assert sorted(order) == list(range(10))
    assert len({tuple(order) for order in orders}) == 4
    assert all(place.has_caption for place in places)


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    asked = [Curriculum(5, 7, 3, 0.5).batch(step) for step in (2, 0, 30)]
    assert asked == [Curriculum(5, 7, 3, 0.5).batch(step) for step in (2, 0, 30)]
    assert asked != [Curriculum(6, 7, 3, 0.5).batch(step) for step in (2, 0, 30)]


def test_captions_are_left_out_as_often_as_asked() -> None:
    curriculum = Curriculum(seed=0, example_count=100, batch_size=10, caption_dropout=0.2)
    shown = Counter(place.has_caption for step in range(400) for place in curriculum.batch(step))
    assert 0.17 <= shown[False] / 4000 <= 0.23


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
