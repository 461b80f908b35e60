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
_WHOLE_PX, _LARGE_TILE_PX, _TILE_PX = 1536, 1024, 512
"""Up to which side a picture is decoded as a whole, the side of tiles beyond it, and that for small
cards."""
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
    besides = step + _ADAPTER_BYTES + _RESERVED_BYTES
    shared = (
        f"a step {_told(step)}, adapters up to {_told(_ADAPTER_BYTES)}, "
        f"{_told(_RESERVED_BYTES)} for CUDA and a screen"
    )
    weights = weight_bytes(DIT_SHAPE, _ELEMENT_BYTES)
    whole_px = side_px if side_px <= _WHOLE_PX else _LARGE_TILE_PX
    room = card_bytes - besides - _vae_bytes(whole_px)
    if weights.all <= room:
        encoder = "cuda" if weights.all + ENCODER_BYTES <= room else "cpu"
        reasons = (
            f"the transformer takes {_told(weights.all)} and is there as a whole",
            f"the VAE takes {_told(_vae_bytes(whole_px))}; {shared}",
            f"the encoder takes {_told(ENCODER_BYTES)}, on device {encoder}",
        )
        return Advice({"encoder": {"device": encoder}}, reasons)
    tile_px = min(side_px, _TILE_PX)
    room = int(card_bytes - besides - _vae_bytes(tile_px)) >> 20 << 20
    if room < weights.least:
        enough = (card_bytes + weights.least - room) / 2**30
        why = f"a card of {enough:.1f} GiB is the least; let a service on another machine draw"
        return Advice({}, (why,))
    count = turn_count(weights, room)
    reasons = (
        f"{count} of the transformer's {weights.block_count} blocks wait in host memory and come "
        f"over for their turn: {_told(count * weights.block)} in every step, while others compute",
        f"the VAE takes {_told(_vae_bytes(tile_px))}, working on tiles of {tile_px} px; {shared}",
        f"the encoder takes {_told(ENCODER_BYTES)} of host memory",
    )
    of_dit = {"max_weight_bytes": room, "vae_tile_px": tile_px}
    return Advice({"encoder": {"device": "cpu"}, "dit": of_dit}, reasons)


def as_toml(advice: Advice, profile: str) -> Iterator[str]:
    """The lines of a settings file; the reasons are comments."""
    yield from (f"# {reason}" for reason in advice.reasons)
    for program, values in advice.settings.items():
        yield f"[{profile}.{program}]"
        for name, value in values.items():
            yield f"{name} = " + (f'"{value}"' if isinstance(value, str) else str(value))


def _vae_bytes(side_px: int) -> int:
    return VAE_BYTES + _VAE_BYTES_PER_PIXEL * side_px**2


def _told(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
