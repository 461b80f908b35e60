"""A stage that was killed ends as if nothing had been."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from demo_model.recipe import stages
from demo_model.recipe.optimiser import Muon
from demo_model.recipe.stages import Stage, warm_up_and_down


class Line:
    """Learns a line from random points; stops before a step on request."""

    def __init__(self, killed_at: int = -1) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self._killed_at = killed_at
        self._optimiser = Muon(
            self.layer.named_parameters(), 0.05, lambda name, _: name == "weight"
        )

    def step(self, number: int, progress: float, chance: random.Random) -> Mapping[str, float]:
        if number == self._killed_at:
            raise KeyboardInterrupt
        points = torch.randn(8, 3) * chance.uniform(0.5, 1.5)
        loss = (self.layer(points) - points[:, :2]).square().mean()
        loss.backward()
        self._optimiser.step(warm_up_and_down(progress, number, 0.3))
        return {"loss": loss.item()}

    def state(self) -> dict[str, Any]:
        return {"layer": self.layer.state_dict(), "optimiser": self._optimiser.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.layer.load_state_dict(state["layer"])
        self._optimiser.load(state["optimiser"])


def test_it_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_CHECKPOINT_SECONDS", 0.0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    straight = Line()
    Stage("line", 200, whole).run(straight)
    for killed_at in (37, 120):
        with pytest.raises(KeyboardInterrupt):
            Stage("line", 200, cut).run(Line(killed_at))
    resumed = Line()
    Stage("line", 200, cut).run(resumed)
    assert torch.equal(resumed.layer.weight, straight.layer.weight)
    assert torch.equal(resumed.layer.bias, straight.layer.bias)
    assert (resumed.layer.weight - torch.eye(2, 3)).abs().max() < 0.1
