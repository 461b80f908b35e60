import pytest

from zimage_core.planning import schedule, sizes, variants


def test_turbo_table() -> None:
    expected = (1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0)
    assert schedule.sigmas(schedule.OFFICIAL, 8, 3.0) == pytest.approx(expected, abs=1e-6)


def test_nine_legacy_steps_are_eight_official_ones() -> None:
    legacy = schedule.sigmas(schedule.LEGACY, 9, 3.0)
    assert legacy == pytest.approx(schedule.sigmas(schedule.OFFICIAL, 8, 3.0))


def test_own_levels_are_shifted_once() -> None:
    assert schedule.shifted([1.0, 0.5], 3.0) == pytest.approx((1.0, 0.75, 0.0))


def test_forwards_are_counted_as_the_sampler_asks_for_them() -> None:
    steps = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert schedule.forward_count(steps, 0.0, 1.0) == 4
    assert schedule.forward_count(steps, 2.5, 1.0) == 8
    assert schedule.forward_count(steps, 2.5, 0.5) == 7  # guidance ends above 1 - sigma = 0.5


@pytest.mark.parametrize(("shift", "name"), [(3.0, "turbo"), (6.0, "base")])
def test_shift_tells_the_variant(shift: float, name: str) -> None:
    variant = variants.by_shift(shift)
    assert variant is not None
    assert variant.name == name


def test_other_shifts_tell_none() -> None:
    assert variants.by_shift(4.5) is None


@pytest.mark.parametrize(
    ("side", "nearest"),
    [(1000, (992, 1008)), (0, (16,)), (-5, (16,)), (5000, (4096,)), (17, (16, 32))],
)
def test_nearest_sides(side: int, nearest: tuple[int, ...]) -> None:
    assert sizes.nearest_sides(side, 16, 4096) == nearest


@pytest.mark.parametrize(("side", "snapped"), [(1000, 1008), (1007, 1008), (3, 16), (999, 992)])
def test_snapping(side: int, snapped: int) -> None:
    assert sizes.snapped(side, 16) == snapped
