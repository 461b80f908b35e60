"""Transformers in a single file, by the names that ComfyUI and the original release use or by those
of diffusers: to the names of diffusers, and to the config that such a file lacks."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dit_service.model import comfy_file, gguf_file
from dit_service.model.config import TransformerConfig
from dit_service.model.stored import Contents, Stored
from zimage_core.errors import InvalidModel
from zimage_core.formats import published

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


def contents(path: Path) -> Contents:
    """Of a safetensors or a GGUF file."""
    with path.open("rb") as file:
        is_gguf = file.read(len(gguf_file.MAGIC)) == gguf_file.MAGIC
    return gguf_file.contents(path) if is_gguf else comfy_file.contents(path)


def read_config(path: Path, stored: Mapping[str, tuple[int, ...]]) -> TransformerConfig:
    """What the shapes tell, and what no shape tells as it was published; raises InvalidModel for a
    file of another family."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in stored.items():
        if _bare(name) in shapes:
            what = f"{_bare(name)} stands in this file twice, with a prefix and without"
            raise InvalidModel.at(path, what, "WEIGHTS_UNKNOWN")
        shapes[_bare(name)] = shape
    try:
        dim, patch_values = _either(shapes, "x_embedder.weight")
        head_dim = _either(shapes, "layers.0.attention.q_norm.weight")[0]
        caption_width = shapes["cap_embedder.1.weight"][1]
    except (KeyError, ValueError, IndexError) as error:
        first = ", ".join(sorted(shapes)[:3])
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
        n_layers=_count(shapes, "layers."),
        n_refiner_layers=_count(shapes, "noise_refiner."),
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


def renamed(name: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
    """A tensor of such a file as diffusers has it: under another name, as three, or not at all."""
    name = _bare(name)
    if name in _UNUSED:
        return
    name = _of_diffusers(name)
    if _FUSED in name:
        if len(stored.values) % len(_SPLIT):
            what = f"the {len(stored.values)} rows of {name} are no queries, keys and values"
            raise InvalidModel(what, reason="WEIGHTS_MISSHAPEN")
        for part, rows in zip(_SPLIT, stored.chunk(len(_SPLIT)), strict=True):
            yield name.replace(_FUSED, part), rows
    elif name.endswith("_pad_token"):  # some files lack the first dimension
        yield name, stored._replace(values=stored.values.reshape(1, -1))
    else:
        yield name, stored


def _either(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """By its name there or at diffusers'; raises KeyError with the former."""
    return shapes.get(_of_diffusers(name)) or shapes[name]


def _of_diffusers(name: str) -> str:
    for old, new in _RENAMED:
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    return name


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _count(names: Iterable[str], prefix: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(prefix)})
