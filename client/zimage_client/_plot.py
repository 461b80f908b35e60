"""A course of losses as a picture that every browser shows."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

_WIDTH, _HEIGHT, _MARGIN = 900, 420, 60
_LINES = 5
_SMOOTHING = 0.98

Point = tuple[int, float]


def smoothed(losses: Iterable[float]) -> list[float]:
    """The running mean behind each of them; what is no number leaves it as it was."""
    return list(accumulate(losses, smoother, initial=math.nan))[1:]


def smoother(mean: float, loss: float) -> float:
    """The running mean behind one more; it begins as no number."""
    if not math.isfinite(loss):
        return mean
    return loss if math.isnan(mean) else _SMOOTHING * mean + (1 - _SMOOTHING) * loss


def svg(title: str, losses: Sequence[Point]) -> str:
    """Losses by their steps, and their running mean; the highest twentieth may leave the scale."""
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    values = sorted(loss for _, loss in finite) or [1.0]
    top = 1.2 * values[math.floor(0.95 * (len(values) - 1))] or 1.0
    last = max((step for step, _ in losses), default=1) or 1

    def at(point: Point) -> str:
        across = _MARGIN + (_WIDTH - 2 * _MARGIN) * point[0] / last
        down = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * min(point[1] / top, 1.05)
        return f"{across:.1f},{down:.1f}"

    means = zip((step for step, _ in finite), smoothed(loss for _, loss in finite), strict=True)
    curves = (("#b8c4d8", 1, finite), ("#c03030", 2, list(means)))
    parts = [_frame(title), *(_line(top * n / _LINES, top) for n in range(_LINES + 1))]
    parts += [
        f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" '
        f'points="{" ".join(map(at, points))}"/>'
        for colour, width, points in curves
    ]
    parts += [_text(_WIDTH - _MARGIN, _HEIGHT - 30, f"step {last}", "end"), "</svg>"]
    return "\n".join(parts) + "\n"


def _frame(title: str) -> str:
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{_text(_MARGIN, 30, title, "start")}'
    )


def _line(value: float, top: float) -> str:
    down = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * value / top
    return (
        f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{down:.1f}" y2="{down:.1f}" '
        f'stroke="#e4e4e4"/>\n{_text(_MARGIN - 8, down + 4, f"{value:.3g}", "end")}'
    )


def _text(across: float, down: float, text: str, anchor: str) -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{across}" y="{down:.1f}" text-anchor="{anchor}">{safe}</text>'
