"""The transformer and the text encoder, learnt together from cached latents."""

import random
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from demo_model import world
from demo_model.recipe import tokenizer as tokens
from demo_model.recipe.canvases import NOTHING
from demo_model.recipe.latents import Scenes
from demo_model.recipe.networks import TRANSFORMER, RMSNorm, TextEncoder, Transformer
from demo_model.recipe.optimiser import Muon
from demo_model.recipe.stages import warm_up_and_down

STEPS = 4500
_AT_ONCE = 64
_RATE = 2e-3
_DECAY = 0.7
SHIFT = 3.0
"""Of the noise levels, in training as in sampling; as Turbo's: few steps and no guidance."""
_SQUARE = 0.8
_LONG = 0.15
"""The share of batches with long captions; they are smaller, for the same time."""
_SHORT_TOKENS, _LONG_TOKENS = 32, 64
_DROPPED = 0.1
_UNIFORM = 0.15
_AVERAGED = 0.998
_HINT, _LATE_HINT, _LATE = 0.1, 0.03, 0.7
"""How much the head counts that says shape and colour of every token; less towards the end."""
_EMPTY_WEIGHT = 0.3
_THINGS_WEIGHT = 3.0
"""How much more velocities count where things are, at little noise; the rest is flat."""
_MATRICES = ("attention.to", "feed_forward", "cap_embedder.1", "self_attn", "mlp.", "x_embedder")


class DiffusionTraining:
    """Velocities by mean square, and what the tokens half way know of shapes and colours."""

    def __init__(
        self,
        scenes: dict[tuple[int, int], Scenes],
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
    ) -> None:
        torch.manual_seed(1)
        self._scenes = scenes
        self._device = device
        [self._empty] = tokens.encode(tokenizer, [""])
        self.networks = nn.ModuleDict({"transformer": Transformer(), "text": TextEncoder()})
        self.networks.to(device)
        self.averaged = deepcopy(self.networks).requires_grad_(False)
        count = len(world.SHAPES) + 1 + len(world.COLOURS)
        self._head = nn.Sequential(
            RMSNorm(TRANSFORMER["dim"], 1e-5), nn.Linear(TRANSFORMER["dim"], count)
        ).to(device)
        weights = torch.ones(len(world.SHAPES) + 1, device=device)
        weights[NOTHING] = _EMPTY_WEIGHT
        longest = {False: (0, _SHORT_TOKENS), True: (_SHORT_TOKENS + 1, _LONG_TOKENS)}
        self._rows = {
            (size, is_long): ofsize.with_captions(*longest[is_long])
            for size, ofsize in scenes.items()
            for is_long in longest
        }
        self._lengths = longest
        self._label_weights = weights
        named = [*self.networks.named_parameters(), *self._head.named_parameters(prefix="head")]
        self._optimiser = Muon(named, _RATE, _is_matrix)

    def step(self, number: int, progress: float, chance: random.Random) -> Mapping[str, float]:
        """One batch of one size of picture."""
        is_square = chance.random() < _SQUARE
        size = world.CANVASES[0] if is_square else chance.choice(world.CANVASES[1:])
        scenes = self._scenes[size]
        is_long = chance.random() < _LONG
        count = _AT_ONCE // (1 + is_long + (not is_square))
        rows = chance.choices(self._rows[size, is_long], k=count)
        token_ids, is_dropped = self._captions(scenes, rows, is_long, chance)
        ids, is_text = (part.to(self._device) for part in tokens.padded(token_ids))
        data = scenes.latents[rows].to(self._device).float()
        sigmas = _noise_levels(count).to(self._device)
        noise = torch.randn_like(data)
        share = sigmas.view(-1, 1, 1, 1)
        with torch.autocast(self._device.type, torch.bfloat16):
            features = self.networks["text"](ids)
            predicted = self.networks["transformer"](
                (1 - share) * data + share * noise, 1 - sigmas, features, is_text
            )
            known = self._head(predicted.middle).float()
        shapes = scenes.shapes[rows].to(self._device)
        velocity = _weighed(predicted.velocity - (data - noise), shapes, sigmas)
        colours = scenes.colours[rows].to(self._device)
        shape, colour = self._hints(known[~is_dropped], shapes[~is_dropped], colours[~is_dropped])
        weight = _HINT if progress < _LATE else _LATE_HINT
        (velocity + weight * (shape + colour)).backward()
        self._optimiser.step(warm_up_and_down(progress, number, _DECAY))
        self._average(number)
        told = {"velocity": velocity, "shape": shape, "colour": colour}
        return {name: value.item() for name, value in told.items()}

    def _captions(
        self, scenes: Scenes, rows: list[int], is_long: bool, chance: random.Random
    ) -> tuple[list[list[int]], Tensor]:
        least, most = self._lengths[is_long]
        chosen, dropped = [], []
        for row in rows:
            fitting = [one for one in scenes.captions[row] if least <= len(one) <= most]
            dropped.append(not is_long and chance.random() < _DROPPED)  # nothing is not long
            chosen.append(self._empty if dropped[-1] else chance.choice(fitting))
        return chosen, torch.tensor(dropped, device=self._device)

    def _hints(self, known: Tensor, shapes: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        known, shapes = known.flatten(0, 1), shapes.flatten()
        count = len(world.SHAPES) + 1
        is_thing = shapes != NOTHING
        told = functional.cross_entropy(known[:, count:], colours.flatten(), reduction="none")
        weights = torch.where(is_thing, 1.0, is_thing.float().mean())  # things count as much
        return (
            functional.cross_entropy(known[:, :count], shapes, self._label_weights),
            (told * weights).sum() / weights.sum(),
        )

    @torch.no_grad()
    def _average(self, number: int) -> None:
        share = 1 - min(_AVERAGED, (number + 1) / (number + 10))
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(self.networks.parameters()), share
        )

    def state(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "networks": self.networks.state_dict(),
            "averaged": self.averaged.state_dict(),
            "head": self._head.state_dict(),
            "optimiser": self._optimiser.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up where the state was made."""
        self.networks.load_state_dict(state["networks"])
        self.averaged.load_state_dict(state["averaged"])
        self._head.load_state_dict(state["head"])
        self._optimiser.load(state["optimiser"])


def _weighed(errors_BCHW: Tensor, shapes_BN: Tensor, sigmas_B: Tensor) -> Tensor:
    """The mean square, with an eye on things."""
    squares_BHW = errors_BCHW.square().mean(1)
    is_thing = (shapes_BN != NOTHING).view(len(sigmas_B), squares_BHW.shape[1] // 2, -1)
    is_thing = is_thing.repeat_interleave(2, 1).repeat_interleave(2, 2)
    weights = 1 + _THINGS_WEIGHT * (1 - sigmas_B.view(-1, 1, 1)) * is_thing
    return (squares_BHW * weights).sum() / weights.sum()


def _noise_levels(count: int) -> Tensor:
    """Mostly in the middle, some anywhere, shifted as sampling shifts them."""
    middle = torch.sigmoid(torch.randn(count))
    level = torch.where(torch.rand(count) < _UNIFORM, torch.rand(count), middle)
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and any(part in name for part in _MATRICES)
