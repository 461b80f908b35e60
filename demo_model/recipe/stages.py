"""A stage of the recipe: so many steps, checkpointed, the same whether it was interrupted or not.

Whatever a step draws, it draws from generators seeded by the stage and the step; so a run that was
killed goes on from its last checkpoint as if nothing had been.
"""

import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_log = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 120.0
_LOG_STEPS = 100


class Training(Protocol):
    """What a stage trains."""

    def step(self, number: int, progress: float, chance: random.Random) -> Mapping[str, float]:
        """One step; `progress` is the share of the stage that is done. Returns what to log."""

    def state(self) -> dict[str, Any]:
        """Everything that changes from step to step."""

    def load(self, state: dict[str, Any]) -> None:
        """Takes up where the state was made."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A training with its length and its place."""

    name: str
    steps: int
    folder: Path

    def run(self, training: Training) -> None:
        """Trains from the last checkpoint to the end, and leaves the end as a checkpoint."""
        checkpoint = self.folder / f"{self.name}.pt"
        first = 0
        if checkpoint.exists():
            kept = torch.load(checkpoint, map_location="cpu", weights_only=False)
            first = kept["step"]
            if kept["steps"] != self.steps:
                raise SystemExit(
                    f"{checkpoint} is of a run of {kept['steps']} steps, not {self.steps}; "
                    "remove it, and all that was made after it, to begin anew"
                )
            training.load(kept["training"])
            _log.info("%s goes on at step %s of %s", self.name, first, self.steps)
        began = saved = time.monotonic()
        sums: dict[str, float] = {}
        for number in range(first, self.steps):
            torch.manual_seed(_seed(self.name, number))
            chance = random.Random(_seed(self.name, number))  # noqa: S311 - no secret
            told = training.step(number, number / self.steps, chance)
            for name, value in told.items():
                sums[name] = 0.98 * sums.get(name, value) + 0.02 * value
            if (number + 1) % _LOG_STEPS == 0:
                pace = (time.monotonic() - began) / (number + 1 - first)
                shown = ", ".join(f"{name} {value:.4f}" for name, value in sums.items())
                _log.info("%s %s/%s, %.3f s: %s", self.name, number + 1, self.steps, pace, shown)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS or number + 1 == self.steps:
                write(
                    checkpoint,
                    {"step": number + 1, "steps": self.steps, "training": training.state()},
                )
                saved = time.monotonic()


def write(path: Path, content: object) -> None:
    """The file appears whole or not at all."""
    scratch = path.with_suffix(".new")
    torch.save(content, scratch)
    os.replace(scratch, path)


def warm_up_and_down(progress: float, number: int, decay: float) -> float:
    """The share of the learning rate: up over the first steps, down to 0 over the last `decay`."""
    return min(1.0, (number + 1) / 50) * min(1.0, (1 - progress) / decay)


def _seed(name: str, number: int) -> int:
    return random.Random(f"{name} {number}").getrandbits(48)  # noqa: S311 - no secret
