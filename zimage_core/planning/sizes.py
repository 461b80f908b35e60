"""Which sides a picture can have."""


def nearest_sides(side: int, multiple: int, longest: int) -> tuple[int, ...]:
    """The valid sides next to one that is not: below and above, where they exist."""
    largest = longest // multiple * multiple
    below = min(max(side // multiple * multiple, multiple), largest)
    above = min(max(-(-side // multiple) * multiple, multiple), largest)
    return tuple(sorted({below, above}))


def snapped(side: int, multiple: int) -> int:
    """The multiple nearest to a side; the larger of two, and never none."""
    return max((side + multiple // 2) // multiple, 1) * multiple
