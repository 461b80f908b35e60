"""Work on a grid in overlapping tiles, put together without seams: for pictures too large at once.

Every part of the result is the mean of the tiles that cover it, each counting less towards an edge
that another covers; at the borders of the picture none does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiling:
    """How large tiles are, and how far neighbours overlap, in cells of the grid."""

    side: int
    overlap: int

    def spans(self, length: int) -> list[slice]:
        """The tiles along a side; the last ends with it, and overlaps the one before further."""
        if length <= self.side:
            return [slice(0, length)]
        last = length - self.side
        begins = [*range(0, last, self.side - self.overlap), last]
        return [slice(begin, begin + self.side) for begin in begins]


def tiled(
    work: Callable[[slice, slice], Tensor],
    grid: tuple[int, int],
    resolution: int,
    tiling: Tiling,
    device: torch.device,
) -> Tensor:
    """What `work` makes of rows and columns of a grid (height, width): [C, height, width] of them
    times the resolution, in float32; each tile by itself, and then all as one."""
    height, width = grid
    rows, columns = tiling.spans(height), tiling.spans(width)
    weight_HW = torch.zeros(height * resolution, width * resolution, device=device)
    row_weights, column_weights = (_weights(one, resolution, device) for one in (rows, columns))
    whole_CHW = None
    for row, row_weight in zip(rows, row_weights, strict=True):
        for column, column_weight in zip(columns, column_weights, strict=True):
            tile_CHW = work(row, column).float()
            if whole_CHW is None:
                whole_CHW = weight_HW.new_zeros(len(tile_CHW), *weight_HW.shape)
            here = _scaled(row, resolution), _scaled(column, resolution)
            weight = torch.outer(row_weight, column_weight)
            whole_CHW[:, *here] += weight * tile_CHW
            weight_HW[here] += weight
    assert whole_CHW is not None
    return whole_CHW.div_(weight_HW)


def _weights(spans: list[slice], resolution: int, device: torch.device) -> list[Tensor]:
    """Of the tiles along a side: rising and falling where two overlap, and never nothing. Made on
    the device: nobody waits for it."""
    weights = [torch.ones((s.stop - s.start) * resolution, device=device) for s in spans]
    for (before, after), (span, following) in zip(pairwise(weights), pairwise(spans), strict=True):
        shared = (span.stop - following.start) * resolution
        rising = torch.arange(1, shared + 1, device=device) / (shared + 1)
        after[:shared] *= rising
        before[len(before) - shared :] *= rising.flip(0)
    return weights


def _scaled(span: slice, resolution: int) -> slice:
    return slice(span.start * resolution, span.stop * resolution)
