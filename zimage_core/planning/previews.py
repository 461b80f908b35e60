"""When a linear map of the latents is good enough to show people."""

LEAST_R_SQUARED = 0.5


def is_good(r_squared: float) -> bool:
    """Whether previews are made of latents; a map that came out as no number is no good."""
    return r_squared >= LEAST_R_SQUARED
