"""Compiled blocks: made and tried at the start in every form that steps use, or given up."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_service.model.adapters import Adapter, Change, Use, Uses
from dit_service.model.likeness import check_likeness
from dit_service.model.transformer import Sample, ZImageTransformer

_log = logging.getLogger(__name__)

_SIZES = ((8, 8, 20), (4, 12, 40))
"""Height and width of latents, prompt tokens: one sample, and beside it another."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """Whether blocks run compiled, and why or why not."""

    is_compiled: bool
    reason: str


def compile_blocks(model: ZImageTransformer, wanted: str, backend: str) -> Compilation:
    """What was wanted, "on", "off" or "auto", as far as it works: a compiler that fails is no
    reason to make no pictures."""
    if wanted == "off":
        return Compilation(False, "it was asked for so")
    if wanted == "auto" and model.device.type != "cuda":
        return Compilation(False, "it is only on an NVIDIA or AMD GPU unless it is asked for")
    torch.compiler.set_stance("default")  # a model before this one may have had the last word
    torch.compiler.reset()
    forms = [(1, ()), (1, _nothing(model)), (2, ()), (2, _nothing(model))]
    eager = [_run(model, *form, backend) for form in forms]
    model.compile_blocks()
    try:
        compiled = [_run(model, *form, backend) for form in forms]
        for made, computed in zip(compiled, eager, strict=True):
            check_likeness(made, computed)
    except Exception as error:  # noqa: BLE001 - whatever a compiler says, eager blocks are there
        model.compile_blocks(compiled=False)
        torch.compiler.reset()
        _log.warning("blocks are not compiled", exc_info=True)
        what = str(error).strip().partition("\n")[0]
        return Compilation(False, f"it failed: {type(error).__name__}: {what}")
    # A form that was not thought of runs eagerly: nobody waits for a compiler.
    torch.compiler.set_stance("eager_on_recompile")
    return Compilation(True, "it worked")


def _run(model: ZImageTransformer, samples: int, uses: Uses, backend: str) -> Tensor:
    """The velocities of some small samples, in a row."""
    generator, sizes = torch.Generator().manual_seed(0), _SIZES[:samples]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    features = [drawn(tokens, model.config.cap_feat_dim) for *_, tokens in sizes]
    captions = model.encode_captions(features, backend, uses)
    moments = model.modulate(torch.linspace(0.2, 0.6, samples, device=model.device), uses)
    packed = [
        Sample(drawn(model.config.in_channels, height, width), caption, moment, uses)
        for (height, width, _), caption, moment in zip(sizes, captions, moments, strict=True)
    ]
    layout = model.layout([model.shape_of(one.latents_CHW, one.caption) for one in packed])
    return torch.cat([velocity.flatten() for velocity in model(packed, layout, backend)])


def _nothing(model: ZImageTransformer) -> Uses:
    """An adapter that adds zeros, in each kind of block."""
    zeros_1D = torch.zeros(1, model.config.dim, device=model.device, dtype=model.dtype)
    change = Change(zeros_1D, zeros_1D.T.contiguous(), 1.0)
    blocks = ("layers.0", "noise_refiner.0", "context_refiner.0")
    return (Use(Adapter({block: {"attention.to_q": change} for block in blocks}), 1.0),)
