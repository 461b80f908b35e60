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


Sampler = Generator[tuple[Forward, ...], tuple[Tensor, ...], Tensor]
"""Yields the forwards of a step, is sent their float32 velocities in order, returns the latents."""


class Run:
    """A sampler under way: what it wants now, and in the end what it made."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.forwards: tuple[Forward, ...] = next(sampler)
        """The forwards of the step at hand; none when all are done."""
        self.steps_done = 0
        self.latents_CHW: Tensor | None = None
        """The finished latents."""

    def send(self, velocities: tuple[Tensor, ...]) -> None:
        """Gives the sampler its predictions, in the order of `forwards`."""
        self.steps_done += 1
        try:
            self.forwards = self._sampler.send(velocities)
        except StopIteration as end:
            self.forwards = ()
            self.latents_CHW = end.value
