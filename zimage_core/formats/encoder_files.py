"""Where an encoder's parts lie: in a model folder, in the encoder's own, or in a single file and a
tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from zimage_core.errors import InvalidModel, InvalidSettings
from zimage_core.formats import encoder_gguf, published, weights
from zimage_core.formats.json_object import read_json_object
from zimage_core.formats.weights import Weight

_TOKENIZER, _CONFIG = "tokenizer.json", "config.json"
_LAYER_NAMES = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"self_attn.{part}.weight" for part in ("q_norm", "k_norm")),
    *(f"mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")),
}
"""What a layer of Qwen3 has; relatives that share the names have more, and compute differently."""


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """The paths, whatever the layout."""

    weights: Path
    """A folder with a config, or a single file."""
    tokenizer: Path
    """Its tokenizer.json."""

    @classmethod
    def of(cls, model: Path, tokenizer: Path | None = None) -> Self:
        """Those of a model folder or a single file; `tokenizer` is a folder or the file itself.
        Raises InvalidSettings for a single file without one."""
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer / _TOKENIZER
        if not model.is_file():
            if (model / _CONFIG).is_file() and not (model / "text_encoder").exists():
                return cls(model, tokenizer or model / _TOKENIZER)  # a checkpoint of Qwen3 alone
            return cls(model / "text_encoder", tokenizer or model / "tokenizer" / _TOKENIZER)
        if tokenizer is None:
            raise InvalidSettings(
                f"{model} is a single file, which holds no tokenizer; give --tokenizer with "
                "Qwen3's tokenizer.json or the folder that it lies in",
                fields={"field": "tokenizer", "given": ""},
            )
        return cls(model, tokenizer)

    def paths(self) -> tuple[Path, ...]:
        """Every file that decides what the encoder answers."""
        config = () if self.weights.is_file() else (self.weights / _CONFIG,)
        return (*config, self.tokenizer, *weights.files(self.weights))

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in llama.cpp's format."""
        return self.weights.is_file() and encoder_gguf.is_gguf(self.weights)

    def config(self) -> Mapping[str, Any]:
        """The config, as transformers names its entries."""
        if not self.weights.is_file():
            return read_json_object(self.weights / _CONFIG)
        if self.is_gguf:
            return encoder_gguf.config(self.weights)
        return _config_of(self.weights, self.tensors())

    def tensors(self) -> dict[str, Weight]:
        """All tensors by canonical name; nothing is read but the headers."""
        if self.is_gguf:
            return encoder_gguf.tensors(self.weights)
        stored = weights.read_all(self.weights)
        return {canonical_name(name): weight for name, weight in stored.items()}


def canonical_name(name: str) -> str:
    """A tensor's name without the prefix that a checkpoint with a language head puts."""
    return name.removeprefix("model.")


def _config_of(path: Path, tensors: Mapping[str, Weight]) -> dict[str, Any]:
    """What the shapes tell of a Qwen3, and what no shape tells as it was published."""
    weights.refuse_quantized(path, tensors)
    layers = _layers_of(path, tensors)
    layer = "layers.0."
    try:
        width = tensors["embed_tokens.weight"].shape[1]
        head_dim = tensors[layer + "self_attn.q_norm.weight"].shape[0]
        heads = tensors[layer + "self_attn.q_proj.weight"].shape[0] // head_dim
        key_value_heads = tensors[layer + "self_attn.k_proj.weight"].shape[0] // head_dim
        between = tensors[layer + "mlp.gate_proj.weight"].shape[0]
    except (KeyError, IndexError, ZeroDivisionError) as error:
        first = ", ".join(sorted(tensors)[:3])
        what = f"this is no Qwen3: there is no usable {error}; its tensors begin with {first}"
        raise InvalidModel.at(path, what, "FOREIGN_MODEL") from None
    if head_dim != published.HEAD_DIM:
        what = (
            f"heads of {head_dim}: a single file is read with the constants of the published "
            f"encoder, whose heads have {published.HEAD_DIM}; give a folder with a config.json"
        )
        raise InvalidModel.at(path, what, "FOREIGN_MODEL")
    return {
        "model_type": "qwen3",
        "vocab_size": tensors["embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": between,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": published.QWEN_NORM_EPS,
        "rope_theta": published.QWEN_ROPE_THETA,
        "max_position_embeddings": published.QWEN_MOST_POSITIONS,
    }


def _layers_of(path: Path, tensors: Mapping[str, Weight]) -> set[str]:
    """The numbers of the layers. A file names no family and no depth: both must show."""
    layers = set()
    for name in tensors:
        match name.split(".", 2):
            case ["layers", layer, part] if not part.endswith("inv_freq"):  # derived
                layers.add(layer)
                if part not in _LAYER_NAMES:
                    raise InvalidModel.at(path, f"this is no Qwen3: it has {name}", "FOREIGN_MODEL")
    if layers and "norm.weight" not in tensors:
        what = "norm.weight is missing: where the end was cut off, no state can be counted from it"
        raise InvalidModel.at(path, what, "WEIGHTS_MISSING")
    return layers
