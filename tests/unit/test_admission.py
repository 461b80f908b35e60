"""Who is let in, who is turned away, and what is promised to those inside."""

import asyncio

import pytest

from zimage_core.errors import DeadlineTooShort, Overloaded
from zimage_core.planning.durations import Durations
from zimage_core.planning.shares import BACKGROUND, INTERACTIVE, Share
from zimage_core.serving.admission import Admission, Cost, Limits


def _admission(waiting: int = 9, seconds: float = 100, held: int = 1000) -> Admission:
    return Admission(Limits(waiting, seconds, held))


def test_one_runs_some_wait_more_are_turned_away() -> None:
    admission = _admission(waiting=1)
    with admission.place() as first, admission.place() as second:
        assert (first.calls_before, second.calls_before) == (0, 1)
        with pytest.raises(Overloaded) as refusal, admission.place():
            pass
        assert refusal.value.fields == {"what": "calls", "given": "1", "allowed": "1"}
        assert refusal.value.retry_after
        first.leave()
        assert second.calls_before == 0
    with admission.place() as again:
        assert again.calls_before == 0


def test_a_place_is_given_back_when_its_call_fails() -> None:
    admission = _admission(waiting=0)
    with pytest.raises(RuntimeError), admission.place():
        raise RuntimeError
    with admission.place() as free:
        assert free.calls_before == 0


def test_a_long_request_comes_in_and_keeps_others_out_until_it_is_far_enough() -> None:
    admission = _admission(seconds=100)
    with admission.place() as long, admission.place() as next_one:
        long.expect(Cost(500.0, 1, turns=50))
        with pytest.raises(Overloaded, match="500 seconds of work, 100 may wait") as refusal:
            next_one.expect(Cost(200.0, 1, turns=50))
        assert refusal.value.retry_after == 30
        with pytest.raises(Overloaded, match="500 seconds"):
            next_one.expect(Cost(None, 1))  # whose work may be long, too
        next_one.expect(Cost(400.0, 1, turns=5))  # which is done before the long one
        long.done(0.9)
        next_one.expect(Cost(200.0, 1))


def test_what_calls_hold_is_bounded_until_it_is_read() -> None:
    admission = _admission(held=1000)
    with admission.place() as slow:
        slow.expect(Cost(None, 5000))  # alone it may hold any
        slow.leave()
        with admission.place() as other, pytest.raises(Overloaded, match="bytes"):
            other.expect(Cost(None, 1))
    with admission.place() as other:
        other.expect(Cost(None, 1))


def test_a_deadline_that_cannot_be_met_is_told_at_once() -> None:
    admission = _admission()
    with admission.place() as first, admission.place() as second:
        first.expect(Cost(10.0, 1, turns=50), time_left=10.5)
        with pytest.raises(DeadlineTooShort) as refusal:
            second.expect(Cost(2.0, 1, turns=10), time_left=3.9)  # ten turns each: 2 and 2
        assert refusal.value.reason == "DEADLINE_UNREACHABLE"
        second.expect(Cost(2.0, 1, turns=10), time_left=4.1)
        with admission.place() as unknown:
            unknown.expect(Cost(None, 1), time_left=0.1)
            with pytest.raises(DeadlineTooShort):
                unknown.expect(Cost(None, 1), time_left=0.0)


def test_what_is_promised_follows_what_is_left_and_whose_it_is() -> None:
    admission = _admission()
    with admission.place() as mine, admission.place() as other, admission.place() as idle:
        mine.expect(Cost(8.0, 1, turns=8))
        other.expect(Cost(8.0, 1, turns=8))
        assert mine.expected_seconds == other.expected_seconds == 16
        mine.done(0.75)
        assert (mine.expected_seconds, other.expected_seconds) == (4, 10)
        idle.expect(Cost(100.0, 1, share=Share(priority=BACKGROUND)))
        assert mine.expected_seconds == 4 + 4 / 4  # a quarter of the time beside it
        with admission.place() as urgent:
            urgent.expect(Cost(8.0, 1, share=Share(priority=INTERACTIVE)))
            assert urgent.expected_seconds == 8 + 8 / 4 + 8 / 16


def test_durations_are_guessed_from_pieces_as_large() -> None:
    durations = Durations()
    assert durations.expected(1000, 1000) is None
    durations.learn(1000, 10_000, 5.0)
    assert durations.expected(900, 1800) == pytest.approx(0.9)
    assert durations.expected(10, 100) == pytest.approx(0.05)
    assert durations.expected(5000, 5000) is None
    for _ in range(30):
        durations.learn(1000, 10_000, 10.0)
    assert durations.expected(1000, 10_000) == pytest.approx(10, rel=0.01)


def test_a_piece_may_grow_until_it_takes_too_long() -> None:
    durations = Durations()
    assert durations.units_within(1.0) == 0
    durations.learn(10, 10, 0.1)
    assert durations.units_within(1.0) == pytest.approx(100)  # as far as is known
    durations.learn(100, 100, 0.5)
    assert durations.units_within(1.0) == pytest.approx(200)  # larger pieces are quicker
    for _ in range(30):
        durations.learn(200, 200, 50.0)  # something else had the machine
    assert durations.units_within(1.0) == pytest.approx(128)  # below the size that is too slow
    for _ in range(100):
        durations.learn(100, 100, 0.5)
    assert durations.units_within(1.0) == pytest.approx(200), "it is tried again"
    assert durations.units_within(0.01) == 0


async def test_items_of_streams_wait_and_leave_room_for_others() -> None:
    admission = _admission(waiting=3)
    order: list[int] = []
    go_on = asyncio.Event()

    async def item(number: int) -> None:
        async with admission.turn(100):
            order.append(number)
            await go_on.wait()

    items = [asyncio.create_task(item(number)) for number in range(5)]
    for _ in range(5):
        await asyncio.sleep(0)
    with admission.place(), admission.place():  # half of the places are theirs
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == [0, 1]
    go_on.set()
    await asyncio.gather(*items)
    assert order == [0, 1, 2, 3, 4]
    with admission.place() as place:
        place.expect(Cost(None, 10_000))  # nothing is held any more
