"""Steps are shared by weight, and nobody waits for ever."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dit_service.engine.lines import Lines
from zimage_core.planning.shares import BACKGROUND, INTERACTIVE, WEIGHTS, Share

_ROOM = 32_768
_One = tuple[Share, int]
"""Whose it is, and a number of its own."""


def _taken(lines: Lines[_One], steps: int, tokens: dict[_One, int]) -> Counter[Share]:
    """The tokens that each share got in some steps; everybody who took part comes again."""
    got: Counter[Share] = Counter()
    for _ in range(steps):
        together = lines.take(is_solo=lambda one: one[1] < 0)
        assert together
        used = sum(tokens[one] for one in together)
        assert used <= _ROOM or len(together) == 1
        assert len(together) == 1 or all(number >= 0 for _, number in together)
        for one in together:
            got[one[0]] += tokens[one]
            lines.join(one, one[0], tokens[one])
    return got


def _filled(*members: tuple[Share, int, int]) -> tuple[Lines[_One], dict[_One, int]]:
    """Lines with so many requests of so many tokens of each share."""
    lines = Lines[_One](_ROOM)
    tokens = {(share, i): each for share, count, each in members for i in range(count)}
    for one, each in tokens.items():
        lines.join(one, one[0], each)
    return lines, tokens


A, B = Share("a"), Share("b")


def test_those_of_one_share_all_take_part() -> None:
    lines, tokens = _filled((A, 20, 64))
    assert len(lines.take(is_solo=lambda _one: False)) == 20
    lines, tokens = _filled((A, 20, 4096))
    assert _taken(lines, 5, tokens) == {A: 5 * _ROOM}


def test_a_project_with_one_request_gets_as_much_as_one_with_many() -> None:
    lines, tokens = _filled((A, 16, 64), (B, 1, 64))
    got = _taken(lines, 40, tokens)
    assert got[A] == got[B] == 40 * 64
    lines, tokens = _filled((A, 30, 4096), (B, 30, 8192))
    got = _taken(lines, 40, tokens)
    assert 0.9 < got[A] / got[B] < 1.1


def test_priorities_share_by_their_weights() -> None:
    urgent, idle = Share(priority=INTERACTIVE), Share(priority=BACKGROUND)
    lines, tokens = _filled((idle, 8, 4096), (urgent, 1, 4096))
    got = _taken(lines, 160, tokens)
    assert got[urgent] / got[idle] == WEIGHTS[INTERACTIVE] / WEIGHTS[BACKGROUND]


def test_whoever_could_not_fit_is_not_owed_more_than_a_turn() -> None:
    lines, tokens = _filled((A, 4, 20_000))
    _taken(lines, 50, tokens)
    tokens[(B, 0)] = 20_000
    lines.join((B, 0), B, 20_000)
    got = _taken(lines, 20, tokens)
    assert abs(got[A] - got[B]) <= 2 * 20_000


_shares = st.sampled_from([Share(p, q) for p in "ab" for q in WEIGHTS])


@given(st.lists(st.tuples(_shares, st.integers(1, 50_000), st.booleans()), min_size=1, max_size=12))
def test_everybody_gets_a_turn_and_nobody_is_lost(members: list[tuple[Share, int, bool]]) -> None:
    lines = Lines[_One](_ROOM)
    tokens: dict[_One, int] = {}
    for number, (share, each, is_solo) in enumerate(members, start=1):
        one = (share, -number if is_solo else number)
        tokens[one] = each
        lines.join(one, share, each)
    left = dict(tokens)
    rounds = 0
    while lines:
        together = lines.take(is_solo=lambda one: one[1] < 0)
        assert together
        for one in together:
            del left[one]
        rounds += 1
    assert not left
    assert rounds <= len(members)


def test_those_nobody_waits_for_are_dropped() -> None:
    lines, _ = _filled((A, 3, 64), (B, 1, 64))
    assert lines.drop(lambda one: one[0] == B) == [(B, 0)]
    assert len(lines.take(is_solo=lambda _one: False)) == 3
    assert not lines
