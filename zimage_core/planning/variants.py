"""What the variants of Z-Image are asked for when the caller does not say."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """The defaults of a variant."""

    name: str
    shift: float
    """The static shift by which a model folder's scheduler tells the variant."""
    step_count: int
    guidance: float
    is_distilled: bool
    """Whether guidance was trained into it, so that more of it does harm."""


TURBO = Variant("turbo", shift=3.0, step_count=8, guidance=0.0, is_distilled=True)
BASE = Variant("base", shift=6.0, step_count=50, guidance=2.5, is_distilled=False)
VARIANTS = {variant.name: variant for variant in (TURBO, BASE)}


def by_shift(shift: float) -> Variant | None:
    """The variant that this shift tells, if it tells one."""
    return next((variant for variant in VARIANTS.values() if variant.shift == shift), None)
