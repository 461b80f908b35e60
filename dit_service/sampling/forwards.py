"""What a sampler asks for: it yields forwards and is sent their predictions, and knows no model."""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

POSITIVE = "positive"
NEGATIVE = "negative"


@dataclass(frozen=True, slots=True)
class Forward:
    """One prediction wanted: the velocity, data minus noise, of these latents at this time."""

    latents_CHW: Tensor
    time: float
    """1 - sigma: 0 is pure noise."""
    conditioning: str
    """Which of the request's conditionings."""


@dataclass(frozen=True, slots=True)
class Step:
    """The forwards of one step, and the way that led here."""

    forwards: tuple[Forward, ...]
    velocity_CHW: Tensor | None = None
    """What the step before followed; None in the first."""

    @property
    def expected_latents(self) -> Tensor | None:
        """The latents that this way ends at if it goes on as it came; None in the first step."""
        if self.velocity_CHW is None:
            return None
        here = self.forwards[0]
        return here.latents_CHW + (1 - here.time) * self.velocity_CHW


Sampler = Generator[Step, tuple[Tensor, ...], Tensor]
"""Yields its steps, is sent the float32 velocities of each in order, returns the latents."""


class Run:
    """A sampler under way: what it wants now, and in the end what it made."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.step: Step | None = next(sampler)
        """The step at hand; None when all are done."""
        self.steps_done = 0
        self.latents_CHW: Tensor | None = None
        """The finished latents."""

    def send(self, velocities: tuple[Tensor, ...]) -> None:
        """Gives the sampler its predictions, in the order of the step's forwards."""
        self.steps_done += 1
        try:
            self.step = self._sampler.send(velocities)
        except StopIteration as end:
            self.step = None
            self.latents_CHW = end.value
