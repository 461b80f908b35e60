"""One random adapter, written in every layout that tools use."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

ALPHA_OVER_RANK = 1.5


@dataclass(frozen=True)
class Lora:
    """What an adapter means: the halves of each linear, and by how much their product counts."""

    halves: Mapping[str, tuple[Tensor, Tensor]]
    strength: float = ALPHA_OVER_RANK

    @property
    def rank(self) -> int:
        return next(iter(self.halves.values()))[0].shape[0]

    def delta(self, linear: str) -> Tensor:
        down, up = self.halves[linear]
        return self.strength * up @ down


def random_lora(
    linears: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, size: float = 0.05
) -> Lora:
    generator = torch.Generator().manual_seed(seed)

    def half(*shape: int) -> Tensor:
        return size * torch.randn(*shape, generator=generator)

    return Lora({name: (half(rank, i), half(o, rank)) for name, (o, i) in linears.items()})


def fused(lora: Lora) -> Lora:
    """The same with q, k and v as one: rank 3r, as converters make it."""
    halves = dict(lora.halves)
    for name in [name for name in halves if name.endswith(".to_q")]:
        block = name.removesuffix(".to_q")
        parts = [halves.pop(f"{block}.to_{one}") for one in "qkv"]
        down, up = torch.cat([d for d, _ in parts]), torch.block_diag(*(u for _, u in parts))
        halves[f"{block}.qkv"] = down, up
    return Lora(halves, lora.strength)


def native(linear: str) -> str:
    """The name in the original code."""
    renamed = linear.replace(".to_out.0", ".out")
    return renamed.replace("all_x_embedder.2-1", "x_embedder").replace(
        "all_final_layer.2-1", "final_layer"
    )


def _dotted(
    prefix: str, lora: Lora, down: str, up: str, name: Callable[[str], str] = str
) -> dict[str, Tensor]:
    tensors = {}
    for linear, (first, second) in lora.halves.items():
        tensors[f"{prefix}{name(linear)}.{down}.weight"] = first.clone()
        tensors[f"{prefix}{name(linear)}.{up}.weight"] = second.clone()
    return tensors


def _alphas(prefix: str, lora: Lora, name: Callable[[str], str] = str) -> dict[str, Tensor]:
    names = [f"{prefix}{name(linear)}.alpha" for linear in lora.halves]
    return {
        name: torch.tensor(lora.strength * half[0].shape[0])
        for name, half in zip(names, lora.halves.values(), strict=True)
    }


def _baked(lora: Lora) -> Lora:
    halves = {name: (d, lora.strength * u) for name, (d, u) in lora.halves.items()}
    return Lora(halves, 1.0)


def _joined(name: str) -> str:
    return name.replace(".", "_")


def _joined_native(name: str) -> str:
    return _joined(native(name))


def _settings(lora: Lora, prefix: str = "transformer.") -> dict[str, str]:
    config = LoraConfig(r=lora.rank, lora_alpha=lora.strength * lora.rank)
    settings = config.to_dict() | {"target_modules": [*lora.halves]}
    text = json.dumps({f"{prefix}{name}": value for name, value in settings.items()})
    return {"format": "pt", "lora_adapter_metadata": text}


AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
_Tensors = dict[str, Tensor]

LAYOUTS: dict[str, Callable[[Lora], tuple[_Tensors, dict[str, str]]]] = {
    "transformer, settings": lambda it: (_dotted("transformer.", it, *AB), _settings(it)),
    "transformer, baked": lambda it: (_dotted("transformer.", _baked(it), *AB), {}),
    "transformer, alpha": lambda it: (
        _dotted("transformer.", it, *AB) | _alphas("transformer.", it),
        {},
    ),
    "seed 001": lambda it: (
        _dotted("transformer.", it, *DOWN_UP) | _alphas("transformer.", it),
        {},
    ),
    "diffusion_model, alpha": lambda it: (
        _dotted("diffusion_model.", it, *AB) | _alphas("diffusion_model.", it),
        {},
    ),
    "diffusion_model, baked": lambda it: (_dotted("diffusion_model.", _baked(it), *AB), {}),
    "diffusion_model, settings": lambda it: (_dotted("diffusion_model.", it, *AB), _settings(it)),
    "diffusion_model, alpha and settings": lambda it: (
        _dotted("diffusion_model.", it, *AB) | _alphas("diffusion_model.", it),
        _settings(it),
    ),
    "diffusion_model, down and up": lambda it: (
        _dotted("diffusion_model.", it, *DOWN_UP) | _alphas("diffusion_model.", it),
        {},
    ),
    "kohya": lambda it: (
        _dotted("lora_unet_", it, *DOWN_UP, _joined) | _alphas("lora_unet_", it, _joined),
        {},
    ),
    "kohya, fused": lambda it: (
        _dotted("lora_unet_", fused(it), *DOWN_UP, _joined_native)
        | _alphas("lora_unet_", fused(it), _joined_native),
        {},
    ),
    "native, fused, A and B": lambda it: (
        _dotted("diffusion_model.", fused(it), *AB, native)
        | _alphas("diffusion_model.", fused(it), native),
        {},
    ),
    "native, fused, down and up": lambda it: (
        _dotted("model.diffusion_model.", fused(it), *DOWN_UP, native)
        | _alphas("model.diffusion_model.", fused(it), native),
        {},
    ),
    "bare": lambda it: (_dotted("", it, *AB), _settings(it, "")),
    "peft": lambda it: (_dotted("base_model.model.", it, *AB), _settings(it, "")),
    "peft, named": lambda it: (
        _dotted("base_model.model.", it, "lora_A.default", "lora_B.default"),
        _settings(it, ""),
    ),
    "lycoris": lambda it: (
        _dotted("lycoris_", it, *DOWN_UP, _joined) | _alphas("lycoris_", it, _joined),
        {},
    ),
    "onetrainer": lambda it: (
        _dotted("lora_transformer_", it, *DOWN_UP, _joined)
        | _alphas("lora_transformer_", it, _joined),
        {},
    ),
    "diffusers of old": lambda it: (
        _dotted("transformer.", it, "lora.down", "lora.up") | _alphas("transformer.", it),
        {},
    ),
}
"""Every layout that one adapter is found in; the same adapter comes of each."""


def write(path: Path, lora: Lora, layout: str) -> Path:
    tensors, metadata = LAYOUTS[layout](lora)
    save_file(tensors, path, metadata or {"format": "pt"})
    return path
