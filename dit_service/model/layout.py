"""Where the tokens of several samples lie in one packed sequence, and their positions.

A layout depends on the samples' shapes alone: it is built once per combination of shapes and passed
to every step.
Shapes: T packed tokens, S samples, 3 axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dit_service.model.rope import Rope, RopeTables
from zimage_core.planning.limits import padded


class SampleShape(NamedTuple):
    """One picture in image tokens, and its caption's rows, pads included."""

    grid_height: int
    grid_width: int
    caption_rows: int

    @property
    def image_tokens(self) -> int:
        """The tokens of the picture without pads."""
        return self.grid_height * self.grid_width

    @property
    def image_rows(self) -> int:
        """The same with pads."""
        return padded(self.image_tokens)


@dataclass(frozen=True, eq=False)
class Segments:
    """A packed sequence: sample s owns the rows from `bounds[s]` to `bounds[s + 1]`.

    Lengths and bounds stay on the host, so that no step waits for the device to learn them.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    device_bounds: Tensor
    """The same where kernels look for them."""
    sample_T: Tensor
    rope: Rope


@dataclass(frozen=True, eq=False)
class Layout:
    """The sequences of a forward: the pictures alone, then each followed by its caption."""

    shapes: tuple[SampleShape, ...]
    image: Segments
    joint: Segments


def per_token(vectors_SD: Tensor, segments: Segments) -> Tensor:
    """Each token's row of what the samples have one row of; a single row serves them all."""
    return vectors_SD if len(vectors_SD) == 1 else vectors_SD.index_select(0, segments.sample_T)


def caption_segments(rows: Sequence[int], tables: RopeTables, device: torch.device) -> Segments:
    """Captions alone; `rows` counts their pads, which continue the positions."""
    return _segments([_caption_positions(count) for count in rows], tables, device)


def build_layout(shapes: Sequence[SampleShape], tables: RopeTables, device: torch.device) -> Layout:
    """The sequences for samples of these shapes, in this order."""
    image = [_image_positions(shape) for shape in shapes]
    joint = [
        torch.cat([positions_T3, _caption_positions(shape.caption_rows)])
        for positions_T3, shape in zip(image, shapes, strict=True)
    ]
    return Layout(
        shapes=tuple(shapes),
        image=_segments(image, tables, device),
        joint=_segments(joint, tables, device),
    )


def _segments(positions: list[Tensor], tables: RopeTables, device: torch.device) -> Segments:
    lengths = tuple(len(positions_T3) for positions_T3 in positions)
    counts_S = torch.tensor(lengths, device="cpu")
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    return Segments(
        lengths=lengths,
        bounds=bounds,
        device_bounds=bounds.to(device),
        sample_T=torch.repeat_interleave(counts_S, output_size=sum(lengths)).to(device),
        rope=tables.at(torch.cat(positions), device),
    )


def _caption_positions(rows: int) -> Tensor:
    positions_T3 = torch.zeros(rows, 3, dtype=torch.long, device="cpu")
    positions_T3[:, 0] = torch.arange(1, rows + 1, device="cpu")
    return positions_T3


def _image_positions(shape: SampleShape) -> Tensor:
    """The picture stands behind its caption on the first axis; its pads all stand at the origin."""
    positions_T3 = torch.zeros(shape.image_rows, 3, dtype=torch.long, device="cpu")
    grid_HW3 = positions_T3[: shape.image_tokens].view(shape.grid_height, shape.grid_width, 3)
    grid_HW3[..., 0] = shape.caption_rows + 1
    grid_HW3[..., 1] = torch.arange(shape.grid_height, device="cpu").unsqueeze(1)
    grid_HW3[..., 2] = torch.arange(shape.grid_width, device="cpu")
    return positions_T3
