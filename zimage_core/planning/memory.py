"""How much memory a transformer's weights take, and which blocks have to take turns where there is
too little: their weights stay in host memory, and two buffers on the device hold them in turn."""

import math
from dataclasses import dataclass

from zimage_core.planning.flops import DitShape, dit_parameter_count
from zimage_core.planning.linears import block_linears

BUFFERS = 2
"""In which blocks take turns on the device."""


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Of a transformer."""

    lasting: int
    """What is on the device in any case."""
    block: int
    """The large linears of each of the blocks that can take turns."""
    block_count: int

    @property
    def all(self) -> int:
        """With every block on the device."""
        return self.lasting + self.block * self.block_count

    @property
    def least(self) -> int:
        """With every block taking turns that can."""
        odd = self.block_count % BUFFERS
        return self.lasting + self.block * (BUFFERS + odd)


FULL = "full"
FOUR_BITS = "nf4"
GROUP = 64
"""Numbers of four bits that have a scale together."""


def weight_bytes(shape: DitShape, element_bytes: int, form: str = FULL) -> WeightBytes:
    """With the large linears in such a form: a byte for each number, or half of one."""
    outputs_of = block_linears(shape).values()
    values = sum(outputs * inputs for outputs, inputs in outputs_of)
    rows = sum(outputs for outputs, _ in outputs_of)
    if form == FULL:
        block = values * element_bytes
    elif form == FOUR_BITS:
        block = values // 2 + 4 * values // GROUP
    else:
        block = values + 4 * rows
    all_blocks = shape.n_layers + 2 * shape.n_refiner_layers
    rest = (dit_parameter_count(shape) - values * all_blocks) * element_bytes
    return WeightBytes(
        lasting=rest + block * shape.n_refiner_layers,
        block=block,
        block_count=shape.n_layers + shape.n_refiner_layers,
    )


def turn_count(weights: WeightBytes, room: float) -> int:
    """How many blocks have to take turns in so many bytes, an even number; raises ValueError for
    less than the least."""
    if weights.all <= room:
        return 0
    if room < weights.least:
        raise ValueError(f"{room:.0f} bytes are given, and {weights.least} are the least")
    staying = (room - weights.lasting) / weights.block - BUFFERS
    turns = weights.block_count - math.floor(staying)
    return turns + turns % BUFFERS


def turning_blocks(shape: DitShape, count: int) -> list[str]:
    """Which blocks those are, in the order in which they run: among the others, so that one arrives
    while several compute."""
    blocks = [f"noise_refiner.{index}" for index in range(shape.n_refiner_layers)]
    blocks += [f"layers.{index}" for index in range(shape.n_layers)]
    return [blocks[index * len(blocks) // count] for index in range(count)]
