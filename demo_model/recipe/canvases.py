"""What the autoencoder learns from: things of any colour on canvases small and large, with the maps
that tell the loss where to look."""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import max_pool2d

from demo_model import drawing, world
from demo_model.drawing import Mask, Placed

NOTHING, UNKNOWN = len(world.SHAPES), -100
"""Labels of a place without a thing, and of one whose thing has no name."""

_OVERSAMPLING = 4
_LATENT = 8
_EDGE_WEIGHT = 3.0
_NAMED = 0.85
_PALETTE = 0.65


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures with what is known of them."""

    pictures: Tensor
    """[B, 3, H, W] from -1 to 1."""
    weights: Tensor
    """[B, 1, H, W]: how much each pixel counts; 1 on average."""
    labels: Tensor
    """[B, H / 8, W / 8]: the shape at each latent, NOTHING or UNKNOWN."""


def closeups(count: int, chance: random.Random) -> Batch:
    """Canvases of 64 x 64 with one thing or two: less background for the same time."""
    return batch([closeup(chance) for _ in range(count)])


def scenes(count: int, chance: random.Random) -> Batch:
    """Pictures as the model will draw them."""
    size = chance.choice(world.CANVASES) if chance.random() < 0.25 else world.CANVASES[0]
    shown = [world.any_scene(chance, held_out=False) for _ in range(count)]
    drawn = []
    for scene in shown:
        placed = drawing.placed(scene, size, chance)
        layers = [(thing, drawing.mask(thing, size)) for thing in placed]
        drawn.append(Canvas(layers, drawing.jittered(scene.background, chance)))
    return batch(drawn)


@dataclass(frozen=True, slots=True)
class Canvas:
    """A picture before it is painted."""

    layers: list[tuple[Placed, Mask]]
    background: tuple[float, ...]


def closeup(chance: random.Random) -> Canvas:
    """One or two things on 64 x 64 pixels."""
    background = _colour(chance)
    layers: list[tuple[Placed, Mask]] = []
    for _ in range(2 if chance.random() < 0.3 else 1):
        small, any_size = chance.uniform(10.5, 14.5), chance.uniform(10.5, 28)
        radius = small if chance.random() < 0.5 else any_size
        room = radius * 0.9 if chance.random() < 0.7 else 0
        x, y = (chance.uniform(min(room, 32), max(64 - room, 32)) for _ in range(2))
        if any(math.hypot(x - t.x, y - t.y) < 1.3 * (radius + t.radius) for t, _ in layers):
            continue  # they would hide each other
        if chance.random() < _NAMED:
            shape = chance.choice(world.SHAPES)
            rgb = _contrasting(background, shape, chance)
            thing = Placed(shape, rgb, x, y, radius, chance.uniform(-0.12, 0.12))
            layers.append((thing, drawing.mask(thing, (64, 64))))
        else:
            thing = Placed("", _contrasting(background, "", chance), x, y, radius, 0.0)
            layers.append((thing, _polygon(x, y, radius, chance)))
    return Canvas(layers, background)


def batch(canvases: list[Canvas]) -> Batch:
    """The canvases painted."""
    pictures, edges, labels = [], [], []
    for canvas in canvases:
        height, width = canvas.layers[0][1].shape
        things = ((cover, thing.rgb) for thing, cover in canvas.layers)
        edge = np.zeros((height, width), np.float32)
        label = np.full((height // _LATENT, width // _LATENT), NOTHING)
        ys, xs = (np.mgrid[: height // _LATENT, : width // _LATENT] + 0.5) * _LATENT
        for thing, cover in canvas.layers:
            soft = ((cover > 0) & (cover < 1)).astype(np.float32)
            edge = np.maximum(edge, soft * min(3.0, 18 / thing.radius))  # small ones count more
            inside = np.hypot(xs - thing.x, ys - thing.y) < 1.15 * thing.radius + 5
            label[inside] = world.SHAPES.index(thing.shape) if thing.shape else UNKNOWN
        pictures.append(drawing.painted(canvas.background, things))
        edges.append(edge)
        labels.append(label)
    edge_B1HW = max_pool2d(torch.from_numpy(np.stack(edges)).unsqueeze(1), 5, 1, 2)
    weights = 1 + _EDGE_WEIGHT * edge_B1HW
    picture_BHW3 = torch.from_numpy(np.stack(pictures)).float()
    return Batch(
        pictures=picture_BHW3.permute(0, 3, 1, 2) / 127.5 - 1,
        weights=weights / weights.mean(),
        labels=torch.from_numpy(np.stack(labels)),
    )


def _colour(chance: random.Random) -> tuple[float, float, float]:
    if chance.random() < _PALETTE:
        return drawing.jittered(chance.choice(list(world.COLOURS)), chance)
    red, green, blue = (chance.uniform(0, 255) for _ in range(3))
    return red, green, blue


def _contrasting(
    background: tuple[float, ...], shape: str, chance: random.Random
) -> tuple[int, int, int]:
    """A colour for a thing; of a named shape none that is held out from it."""
    while True:
        rgb = red, green, blue = _colour(chance)
        nearest = min(world.COLOURS, key=lambda name: math.dist(world.COLOURS[name], rgb))
        is_held_out = shape and world.is_held_out(shape, nearest)
        if math.dist(background, rgb) > 60 and not is_held_out:
            return round(red), round(green), round(blue)


def _polygon(x: float, y: float, radius: float, chance: random.Random) -> Mask:
    """A shape without a name, perhaps with a hole or stripes: so that edges of all kinds are kept,
    and shapes that are learnt later find room."""
    corners, phase = chance.randint(3, 9), chance.uniform(0, 6.28)
    points = []
    for corner in range(corners):
        reach = radius * chance.uniform(0.45, 1.25)
        angle = phase + 2 * math.pi * corner / corners
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    image = Image.new("L", (64 * _OVERSAMPLING, 64 * _OVERSAMPLING))
    canvas = ImageDraw.Draw(image)

    def fill(polygon: list[tuple[float, float]], level: int) -> None:
        canvas.polygon(
            [(_OVERSAMPLING * (x + u) - 0.5, _OVERSAMPLING * (y + v) - 0.5) for u, v in polygon],
            level,
        )

    fill(points, 255)
    kind = chance.random()
    if kind < 0.25:
        share = chance.uniform(0.2, 0.5)
        fill([(share * u, share * v) for u, v in points], 0)
    elif kind < 0.4:
        low = radius * chance.uniform(-0.6, 0.3)
        high, far = low + radius * chance.uniform(0.2, 0.4), 2 * radius
        fill([(-far, low), (far, low), (far, high), (-far, high)], 0)
    return np.asarray(image.reduce(_OVERSAMPLING), np.float32) / np.float32(255)
