"""Qwen3 in GGUF files, under llama.cpp's names: plain floats, or blocks of a few bits, which lose
something and so are another encoder."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.errors import InvalidModel
from zimage_core.files import Stamp, stamp
from zimage_core.formats.weights import Weight

if TYPE_CHECKING:
    import numpy as np

_MAGIC = b"GGUF"
_FAMILY = "qwen3"
_OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(path: Path) -> bool:
    """By how it begins."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def config(path: Path) -> dict[str, Any]:
    """As transformers names its entries."""
    reader = _reader(path)

    def said(key: str) -> Any:
        field = reader.get_field(key.replace("ARCH", _FAMILY))
        if field is None:
            raise InvalidModel.at(path, f"its header lacks {key.replace('ARCH', _FAMILY)}")
        return field.contents()

    if (family := said("general.architecture")) != _FAMILY:
        what = f"this is a {family} model; Z-Image's text encoder is {_FAMILY}"
        raise InvalidModel.at(path, what, "FOREIGN_MODEL")
    [table] = [one for one in reader.tensors if one.name == "token_embd.weight"] or [None]
    if table is None:
        raise InvalidModel.at(path, "no tensor token_embd.weight in this file")
    return {
        "model_type": _FAMILY,
        "vocab_size": int(table.shape[1]),
        "hidden_size": said("ARCH.embedding_length"),
        "intermediate_size": said("ARCH.feed_forward_length"),
        "num_hidden_layers": said("ARCH.block_count"),
        "num_attention_heads": said("ARCH.attention.head_count"),
        "num_key_value_heads": said("ARCH.attention.head_count_kv"),
        "head_dim": said("ARCH.attention.key_length"),
        "hidden_act": "silu",
        # Written in float32: 1e-6 reads as another number.
        "rms_norm_eps": float(f"{said('ARCH.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(said("ARCH.rope.freq_base")),
        "max_position_embeddings": said("ARCH.context_length"),
    }


def tensors(path: Path) -> dict[str, Weight]:
    """All that belong to the encoder, by canonical name; blocks are as they are in the file."""
    found = {}
    for one in _reader(path).tensors:
        if name := _canonical(one.name):
            shape = tuple(int(size) for size in reversed(one.shape))
            found[name] = Weight(one.tensor_type.name, shape, memoryview(one.data).cast("B"))
    return found


def values(path: Path, name: str, weight: Weight) -> "np.ndarray[Any, Any]":
    """The numbers that a tensor stands for, in float32."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.frombuffer(weight.data, np.uint8).reshape(*weight.shape[:-1], -1)
    plain = {"F32": np.float32, "F16": np.float16}.get(weight.element_type)
    try:
        kind = GGMLQuantizationType[weight.element_type]
        wide = dequantize(raw.view(plain) if plain else raw, kind)
    except (NotImplementedError, ValueError) as error:
        what = f"{name} is stored as {weight.element_type}, which is not read: {error}"
        raise InvalidModel.at(path, what, "QUANTIZED") from error
    return np.require(wide, np.float32, "W").reshape(weight.shape)


def _reader(path: Path) -> Any:
    return _read(path, stamp(path))


@functools.lru_cache(maxsize=1)
def _read(path: Path, _stamp: Stamp) -> Any:
    """Once for all that a start asks of it: the library walks through every token of the header."""
    from gguf import GGUFReader  # what a front starts with does without it

    try:
        return GGUFReader(path)
    except Exception as error:  # a damaged file breaks the library in many ways
        raise InvalidModel.at(path, f"this GGUF file cannot be read: {error}") from error


def _canonical(name: str) -> str:
    """Empty for what the encoder has no use for: the head, and tables that are computed."""
    match name.split("."):
        case [part, kind] if part in _OUTSIDE:
            return f"{_OUTSIDE[part]}.{kind}"
        case ["blk", layer, part, kind] if part in _INSIDE:
            return f"layers.{layer}.{_INSIDE[part]}.{kind}"
        case _:
            return ""
