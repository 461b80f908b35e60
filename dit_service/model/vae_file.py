"""A VAE in a single file by the names of the original latent diffusion code, as ComfyUI has it."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from zimage_core.errors import InvalidModel
from zimage_core.formats import published
from zimage_core.formats.weights import Weight, read_file


def read(path: Path, dtype: torch.dtype) -> Any:
    """diffusers' model of it; its config is made of shapes and of what was published."""
    stored = dict(read_file(path))
    with tempfile.TemporaryDirectory() as folder:  # the library takes its config from a folder
        (Path(folder) / "config.json").write_text(json.dumps(_config(path, stored)))
        return AutoencoderKL.from_single_file(
            str(path), config=folder, torch_dtype=dtype, local_files_only=True
        )


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
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in stored,
        "use_quant_conv": "quant_conv.weight" in stored,
        "use_post_quant_conv": "post_quant_conv.weight" in stored,
        "scaling_factor": published.VAE_SCALING_FACTOR,
        "shift_factor": published.VAE_SHIFT_FACTOR,
        "sample_size": published.VAE_SIDE_PX,
        "force_upcast": False,
    }
