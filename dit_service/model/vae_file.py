"""A VAE in a single file by the names of the original latent diffusion code, as ComfyUI has it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open

from zimage_core.errors import InvalidModel
from zimage_core.formats import published
from zimage_core.formats.weights import Weight, read_file, refuse_quantized


def read(path: Path, dtype: torch.dtype) -> Any:
    """diffusers' model of it; its config is made of shapes and of what was published. Raises
    RuntimeError for weights that are missing or do not fit: diffusers' own `from_single_file` would
    leave them random."""
    stored = dict(read_file(path))
    config = _config(path, stored)
    refuse_quantized(path, stored)
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in stored}
    converted = convert_ldm_vae_checkpoint(tensors, config)
    with torch.device("meta"):
        model: Any = AutoencoderKL.from_config(config)
    # Copied even where nothing changes: a view would need the file for as long as it lives.
    copies = {name: weight.to(dtype, copy=True) for name, weight in converted.items()}
    model.load_state_dict(copies, assign=True)
    return model


def _config(path: Path, stored: Mapping[str, Weight]) -> dict[str, Any]:
    try:
        channels = stored["decoder.conv_in.weight"].shape[1]
        levels = {int(name.split(".")[2]) for name in stored if name.startswith("encoder.down.")}
        if not levels:
            raise KeyError("encoder.down.0")
        widths = [stored[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in sorted(levels)]
    except (KeyError, IndexError, ValueError) as error:
        first = ", ".join(sorted(stored)[:3])
        what = f"this is no VAE of latent diffusion: no usable {error}; it has {first}, ..."
        raise InvalidModel.at(path, what, "FOREIGN_VAE") from None
    if channels != published.VAE_LATENT_CHANNELS:
        wanted = published.VAE_LATENT_CHANNELS
        what = f"this VAE has {channels} latent channels; Z-Image's, which is Flux's, has {wanted}"
        raise InvalidModel.at(path, what, "FOREIGN_VAE")
    if "quant_conv.weight" in stored:
        what = "this VAE has quant_conv; Z-Image's, which is Flux's, has none"
        raise InvalidModel.at(path, what, "FOREIGN_VAE")
    blocks = {name.split(".")[4] for name in stored if name.startswith("encoder.down.0.block.")}
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": channels,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": len(blocks),
        "norm_num_groups": published.VAE_NORM_GROUPS,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": published.VAE_SCALING_FACTOR,
        "shift_factor": published.VAE_SHIFT_FACTOR,
        "sample_size": published.VAE_SIDE_PX,
        "force_upcast": False,
    }
