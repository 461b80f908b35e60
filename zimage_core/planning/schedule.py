"""How noise falls from step to step, and which steps are guided: front and sampler agree because
both ask here."""

from collections.abc import Sequence

OFFICIAL = "official"
LEGACY = "legacy"


def sigmas(rule: str, step_count: int, shift: float) -> tuple[float, ...]:
    """The noise levels of a rule, shifted, the final 0 included.

    Official: as many forwards as steps. Legacy, the older spelling: the last of its steps would
    start at 0 and move nothing, so N steps are N - 1 forwards.
    """
    if rule == LEGACY:
        raw = [1 - i / (step_count - 1) for i in range(step_count - 1)]
    else:
        raw = [1 - i / step_count for i in range(step_count)]
    return shifted(raw, shift)


def shifted(raw: Sequence[float], shift: float) -> tuple[float, ...]:
    """Noise levels after the static shift, with the final 0."""
    return (*(shift * sigma / (1 + (shift - 1) * sigma) for sigma in raw), 0.0)


def is_guided(sigma: float, guidance: float, truncation: float) -> bool:
    """Whether the step that starts at `sigma` takes a negative forward beside the positive one."""
    return guidance > 0 and not (truncation <= 1 and 1 - sigma > truncation)


def forward_count(schedule: Sequence[float], guidance: float, truncation: float) -> int:
    """How many forwards one picture takes."""
    return sum(1 + is_guided(sigma, guidance, truncation) for sigma in schedule[:-1])
