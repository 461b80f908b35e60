"""Scenes for the transformer, drawn and encoded once, with captions and what each token shows."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_model import captions, drawing, world
from demo_model.captions import PLAIN, TRAINING, Wording
from demo_model.recipe import tokenizer as tokens
from demo_model.recipe.canvases import NOTHING
from demo_model.recipe.stages import write

_log = logging.getLogger(__name__)

CHUNKS = {(128, 128): 48, (192, 128): 8, (128, 192): 8}
"""How many files of scenes there are for each size of picture."""
_PER_CHUNK = 500
_AT_ONCE = 10
_TOKEN_PX = 16
_WORDINGS = (
    PLAIN,
    Wording(),
    TRAINING,
    Wording(omit=0.5),
    Wording(filler=1.0),
)
"""One caption of each for every scene."""


@dataclass(frozen=True, slots=True)
class Scenes:
    """Scenes of one size of picture."""

    latents: Tensor
    """[N, 16, H, W] in half precision."""
    captions: list[list[list[int]]]
    """For each scene, the token ids of each wording."""
    shapes: Tensor
    """[N, tokens]: the shape at each token, or NOTHING."""
    colours: Tensor
    """[N, tokens]: the colour at each token, of the thing or of the background."""

    def with_captions(self, shortest: int, longest: int) -> list[int]:
        """The scenes that have a caption of such a length."""
        return [
            index
            for index, captions in enumerate(self.captions)
            if any(shortest <= len(caption) <= longest for caption in captions)
        ]


def encode_all(
    folder: Path, autoencoder: Any, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> None:
    """Writes every chunk that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, count in CHUNKS.items():
        for number in range(count):
            path = folder / f"{size[0]}x{size[1]}-{number}.pt"
            if not path.exists():
                write(path, _chunk(size, number, autoencoder, tokenizer, device))
                _log.info("latents %sx%s %s/%s", *size, number + 1, count)


def load(folder: Path) -> dict[tuple[int, int], Scenes]:
    """All of them, by the size of the pictures."""
    found = {}
    for size, count in CHUNKS.items():
        paths = [folder / f"{size[0]}x{size[1]}-{number}.pt" for number in range(count)]
        chunks = [torch.load(path, weights_only=False) for path in paths]
        found[size] = Scenes(
            latents=torch.cat([chunk["latents"] for chunk in chunks]),
            captions=[one for chunk in chunks for one in chunk["captions"]],
            shapes=torch.cat([chunk["shapes"] for chunk in chunks]),
            colours=torch.cat([chunk["colours"] for chunk in chunks]),
        )
    return found


def _chunk(
    size: tuple[int, int],
    number: int,
    autoencoder: Any,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
) -> dict[str, Any]:
    chance = random.Random(f"latents {size} {number}")  # noqa: S311 - no secret
    pictures, texts, shapes, colours = [], [], [], []
    for _ in range(_PER_CHUNK):
        scene = world.any_scene(chance, held_out=False)
        placed = drawing.placed(scene, size, chance)
        masks = [drawing.mask(thing, size) for thing in placed]
        background = drawing.jittered(scene.background, chance)
        pictures.append(
            drawing.compose(background, zip(masks, (t.rgb for t in placed), strict=True))
        )
        texts += [captions.caption(scene, wording, chance) for wording in _WORDINGS]
        shape, colour = _labels(scene, placed, size)
        shapes.append(shape)
        colours.append(colour)
    encoded = tokens.encode(tokenizer, texts)
    count = len(_WORDINGS)
    return {
        "latents": _encoded(np.stack(pictures), autoencoder, device),
        "captions": [encoded[at : at + count] for at in range(0, len(encoded), count)],
        "shapes": torch.from_numpy(np.stack(shapes)),
        "colours": torch.from_numpy(np.stack(colours)),
    }


@torch.inference_mode()
def _encoded(pictures: Any, autoencoder: Any, device: torch.device) -> Tensor:
    found = []
    for at in range(0, len(pictures), _AT_ONCE):
        levels = torch.from_numpy(pictures[at : at + _AT_ONCE]).to(device).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16):
            latents = autoencoder.encode(levels.permute(0, 3, 1, 2)).latent_dist.mean
        found.append(latents.half().cpu())
    return torch.cat(found)


def _labels(
    scene: world.Scene, placed: list[drawing.Placed], size: tuple[int, int]
) -> tuple[Any, Any]:
    rows, columns = size[1] // _TOKEN_PX, size[0] // _TOKEN_PX
    ys, xs = (np.mgrid[:rows, :columns] + 0.5) * _TOKEN_PX
    shape = np.full((rows, columns), NOTHING)
    colour = np.full((rows, columns), list(world.COLOURS).index(scene.background))
    for thing, at in zip(scene.things, placed, strict=True):
        inside = np.hypot(xs - at.x, ys - at.y) < at.radius + 5
        shape[inside] = world.SHAPES.index(thing.shape)
        colour[inside] = list(world.COLOURS).index(thing.colour)
    return shape.reshape(-1), colour.reshape(-1)
