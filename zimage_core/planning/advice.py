"""Which settings suit a card, by arithmetic over the sizes of the published models."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zimage_core.formats.published import DIT_SHAPE, ENCODER_BYTES, VAE_BYTES
from zimage_core.planning.flops import dit_row_elements
from zimage_core.planning.memory import turn_count, weight_bytes

CARDS = {"rtx4090": 24, "rtx4080": 16, "rtx3060": 12, "rtx3060ti": 8}
"""Profiles by the memory of the card that they are named after, in GiB."""

_ELEMENT_BYTES = 2
_PROMPT_ROWS = 128
_VAE_BYTES_PER_PIXEL = 1300
"""What decoding takes in bfloat16."""
_TILE_PX = 512
_ADAPTER_BYTES = 1 << 30
_RESERVED_BYTES = 1 << 30
"""CUDA itself, a screen, and what is lost between pieces."""

Settings = Mapping[str, Mapping[str, object]]
"""By program and name."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Settings for a card; none where it is too small. What takes how much of it."""

    settings: Settings
    reasons: tuple[str, ...]


def advise(card_bytes: float, side_px: int) -> Advice:
    """For pictures of that side."""
    step = (side_px // 16) ** 2 + _PROMPT_ROWS
    step *= dit_row_elements(DIT_SHAPE) * _ELEMENT_BYTES
    besides = step + VAE_BYTES + _ADAPTER_BYTES + _RESERVED_BYTES
    weights = weight_bytes(DIT_SHAPE, _ELEMENT_BYTES, is_narrow=False)
    whole_room = card_bytes - besides - _VAE_BYTES_PER_PIXEL * side_px**2
    tiled_room = card_bytes - besides - _VAE_BYTES_PER_PIXEL * min(side_px, _TILE_PX) ** 2
    shared = f"a step {_told(step)}, adapters up to {_told(_ADAPTER_BYTES)}, " + (
        f"{_told(_RESERVED_BYTES)} for CUDA and a screen"
    )
    if weights.all <= whole_room:
        fits = weights.all + ENCODER_BYTES <= whole_room
        encoder, where = ("cuda", "on the card") if fits else ("cpu", "in host memory")
        return Advice(
            {"encoder": {"device": encoder}, "dit": {}},
            (
                f"the transformer takes {_told(weights.all)} and is there as a whole",
                f"the VAE takes {_told(VAE_BYTES + _VAE_BYTES_PER_PIXEL * side_px**2)}; {shared}",
                f"the encoder takes {_told(ENCODER_BYTES)}, {where}",
            ),
        )
    if tiled_room < weights.least:
        least = weights.least - tiled_room + card_bytes
        why = f"it takes a card of {least / 2**30:.1f} GiB; let a service on another machine draw"
        return Advice({}, (why,))
    count = turn_count(weights, tiled_room)
    return Advice(
        {
            "encoder": {"device": "cpu"},
            "dit": {"max_weight_bytes": int(tiled_room), "vae_tile_px": _TILE_PX},
        },
        (
            f"{count} of the transformer's {weights.block_count} blocks wait in host memory and "
            f"come over for their turn: {_told(count * weights.block)} in every step, while others "
            "compute",
            f"the VAE works on tiles of {_TILE_PX} px; {shared}",
            f"the encoder takes {_told(ENCODER_BYTES)} of host memory",
        ),
    )


def as_toml(advice: Advice, profile: str) -> Iterator[str]:
    """The lines of a settings file; the reasons are comments."""
    yield from (f"# {reason}" for reason in advice.reasons)
    for program, values in advice.settings.items():
        if values:
            yield f"[{profile}.{program}]"
            for name, value in values.items():
                yield f"{name} = " + (f'"{value}"' if isinstance(value, str) else str(value))


def _told(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
