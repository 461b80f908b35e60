"""Steps are shared by weight, the nearest to its end goes first, and nobody waits for ever."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dit_service.engine.lines import Lines, Load, Waiting
from zimage_core.planning.shares import BACKGROUND, INTERACTIVE, WEIGHTS, Share

_ROOM = Load(flops=32_768, bytes=1 << 20)
A, B = Share("a"), Share("b")


def _one(share: Share, number: int, flops: float, *, left: float = 1e9) -> Waiting[int]:
    return Waiting(
        one=number,
        share=share,
        arrival=number,
        load=Load(flops, flops),
        flops_left=left,
        is_solo=False,
    )


def _filled(*members: tuple[Share, int, int]) -> tuple[Lines[int], dict[int, Waiting[int]]]:
    """Lines with so many requests of each share that take so much of a step."""
    every = [(share, flops) for share, count, flops in members for _ in range(count)]
    known = {number: _one(share, number, flops) for number, (share, flops) in enumerate(every)}
    lines = Lines[int]()
    for waiting in known.values():
        lines.join(waiting)
    return lines, known


def _taken(lines: Lines[int], steps: int, known: dict[int, Waiting[int]]) -> Counter[Share]:
    """What each share got of some steps; everybody who took part comes again."""
    got: Counter[Share] = Counter()
    for _ in range(steps):
        together = [known[number] for number in lines.take(_ROOM)]
        assert together
        used = sum(waiting.load.flops for waiting in together)
        assert used <= _ROOM.flops or len(together) == 1
        assert len(together) == 1 or not any(waiting.is_solo for waiting in together)
        for waiting in together:
            got[waiting.share] += int(waiting.load.flops)
            lines.join(waiting)
    return got


def test_those_of_one_share_all_take_part() -> None:
    lines, known = _filled((A, 20, 64))
    assert len(lines.take(_ROOM)) == 20
    lines, known = _filled((A, 20, 4096))
    assert _taken(lines, 5, known) == {A: 5 * _ROOM.flops}


def test_a_step_has_room_in_memory_too() -> None:
    lines, _ = _filled((A, 20, 64))
    assert len(lines.take(Load(flops=1e9, bytes=640))) == 10
    assert len(lines.take(Load(flops=1e9, bytes=1))) == 1


def test_a_project_with_one_request_gets_as_much_as_one_with_many() -> None:
    lines, known = _filled((A, 16, 64), (B, 1, 64))
    got = _taken(lines, 40, known)
    assert got[A] == got[B] == 40 * 64
    lines, known = _filled((A, 30, 4096), (B, 30, 8192))
    got = _taken(lines, 40, known)
    assert 0.9 < got[A] / got[B] < 1.1


def test_priorities_share_by_their_weights() -> None:
    urgent, idle = Share(priority=INTERACTIVE), Share(priority=BACKGROUND)
    lines, known = _filled((idle, 8, 4096), (urgent, 1, 4096))
    got = _taken(lines, 160, known)
    assert got[urgent] / got[idle] == WEIGHTS[INTERACTIVE] / WEIGHTS[BACKGROUND]


def test_whoever_could_not_fit_is_not_owed_more_than_a_turn() -> None:
    lines, known = _filled((A, 4, 20_000))
    _taken(lines, 50, known)
    known[4] = _one(B, 4, 20_000)
    lines.join(known[4])
    got = _taken(lines, 20, known)
    assert abs(got[A] - got[B]) <= 2 * 20_000


def _run(lines: Lines[int], known: dict[int, Waiting[int]]) -> list[int]:
    """The order in which all come to their end, each after so many steps as it has left."""
    done: list[int] = []
    left = dict(known)
    while lines:
        for number in lines.take(_ROOM):
            waiting = left[number]
            rest = waiting.flops_left - waiting.load.flops
            if rest > 0:
                left[number] = replace(waiting, flops_left=rest)
                lines.join(left[number])
            else:
                done.append(number)
    return done


def test_equals_are_done_in_the_order_in_which_they_came() -> None:
    full = _ROOM.flops
    known = {number: _one(A, number, full, left=8 * full) for number in range(6)}
    lines = Lines[int]()
    for waiting in known.values():
        lines.join(waiting)
    assert _run(lines, known) == list(range(6))


def test_a_short_one_is_done_before_a_long_one_that_came_first() -> None:
    full = _ROOM.flops
    known = {0: _one(A, 0, full, left=50 * full), 1: _one(A, 1, full, left=4 * full)}
    lines = Lines[int]()
    for waiting in known.values():
        lines.join(waiting)
    assert _run(lines, known) == [1, 0]


def test_a_long_one_comes_to_its_end_in_a_stream_of_short_ones() -> None:
    full = _ROOM.flops
    lines = Lines[int]()
    lines.join(_one(A, 0, full, left=10 * full))
    steps_of_the_long = 0
    for number in range(1, 50):  # a new one in each step: the device is never free
        lines.join(_one(A, number, full, left=full))
        if lines.take(_ROOM) == [0]:
            steps_of_the_long += 1
            lines.join(_one(A, 0, full, left=(10 - steps_of_the_long) * full))
    assert steps_of_the_long >= 10


def test_a_long_one_comes_to_its_end_beside_another_projects_stream() -> None:
    full = _ROOM.flops
    lines = Lines[int]()
    lines.join(replace(_one(A, 0, full, left=10 * full), is_solo=True))
    steps_of_the_long = 0
    for number in range(1, 200, 2):
        lines.join(_one(A, number, full, left=full))
        lines.join(_one(B, number + 1, full, left=full))
        if lines.take(_ROOM) == [0]:
            steps_of_the_long += 1
            left = (10 - steps_of_the_long) * full
            lines.join(replace(_one(A, 0, full, left=left), is_solo=True))
    assert steps_of_the_long >= 10


_shares = st.sampled_from([Share(p, q) for p in "ab" for q in WEIGHTS])


@given(st.lists(st.tuples(_shares, st.integers(1, 50_000), st.booleans()), min_size=1, max_size=12))
def test_everybody_gets_a_turn_and_nobody_is_lost(members: list[tuple[Share, int, bool]]) -> None:
    lines = Lines[int]()
    for number, (share, flops, is_solo) in enumerate(members):
        lines.join(replace(_one(share, number, flops), is_solo=is_solo))
    left = set(range(len(members)))
    rounds = 0
    while lines:
        together = lines.take(_ROOM)
        assert together
        assert len(together) == 1 or not any(members[number][2] for number in together)
        left -= set(together)
        rounds += 1
    assert not left
    assert rounds <= len(members)


def test_those_nobody_waits_for_are_dropped() -> None:
    lines, _ = _filled((A, 3, 64), (B, 1, 64))
    assert lines.drop(lambda one: one == 3) == [3]
    assert len(lines.take(_ROOM)) == 3
    assert not lines
