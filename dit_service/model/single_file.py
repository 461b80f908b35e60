"""Transformers in a single file, by the names that ComfyUI and the original release use: to the
names of diffusers, and to the config that such a file lacks."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dit_service.model.config import TransformerConfig
from zimage_core.errors import InvalidModel
from zimage_core.formats import published
from zimage_core.formats.weights import Weight, read_file, refuse_quantized

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_RENAMED = (
    ("x_embedder.", f"all_x_embedder.{published.DIT_PATCH_SIZE}-1."),
    ("final_layer.", f"all_final_layer.{published.DIT_PATCH_SIZE}-1."),
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
)
_FUSED, _SPLIT = ".attention.qkv.", (".attention.to_q.", ".attention.to_k.", ".attention.to_v.")
_UNUSED = {"norm_final.weight"}


def read_config(path: Path) -> TransformerConfig:
    """What the shapes tell, and what no shape tells as it was published; raises InvalidModel for a
    file of another family, and for a quantized one."""
    stored: dict[str, Weight] = {}
    for name, weight in read_file(path):
        if _bare(name) in stored:
            what = f"{_bare(name)} stands in this file twice, with a prefix and without"
            raise InvalidModel.at(path, what, "WEIGHTS_UNKNOWN")
        stored[_bare(name)] = weight
    refuse_quantized(path, stored)
    try:
        dim, patch_values = stored["x_embedder.weight"].shape
        head_dim = stored["layers.0.attention.q_norm.weight"].shape[0]
        caption_width = stored["cap_embedder.1.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        first = ", ".join(sorted(stored)[:3])
        what = f"this is no Z-Image transformer: there is no usable {error}; it has {first}, ..."
        raise InvalidModel.at(path, what, "FOREIGN_MODEL") from None
    if head_dim != published.HEAD_DIM:
        what = (
            f"heads of {head_dim}: a single file is read with the constants of the published "
            f"models, whose heads have {published.HEAD_DIM}; give a folder in diffusers layout"
        )
        raise InvalidModel.at(path, what, "FOREIGN_MODEL")
    return TransformerConfig(
        dim=dim,
        n_layers=_count(stored, "layers."),
        n_refiner_layers=_count(stored, "noise_refiner."),
        n_heads=dim // head_dim,
        in_channels=patch_values // published.DIT_PATCH_SIZE**2,
        cap_feat_dim=caption_width,
        patch_size=published.DIT_PATCH_SIZE,
        axes_dims=published.DIT_AXES_DIMS,
        axes_lens=published.DIT_AXES_LENS,
        norm_eps=published.DIT_NORM_EPS,
        rope_theta=published.DIT_ROPE_THETA,
        t_scale=published.DIT_TIME_SCALE,
    )


def renamed(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of such a file as diffusers has it: under another name, as three, or not at all."""
    name = _bare(name)
    if name in _UNUSED:
        return
    for old, new in _RENAMED:
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    if _FUSED in name:
        for part, rows in zip(_SPLIT, weight.chunk(3), strict=True):
            yield name.replace(_FUSED, part), rows
    elif name.endswith("_pad_token"):
        yield name, weight.reshape(1, -1)  # some files lack the first dimension
    else:
        yield name, weight


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _count(stored: Mapping[str, Weight], prefix: str) -> int:
    return len({name.split(".")[1] for name in stored if name.startswith(prefix)})
