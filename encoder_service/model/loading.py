"""From files to an encoder on its device: what is read, to where, in which type."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen3Config

from encoder_service.model import narrow
from encoder_service.model.narrow import FULL
from encoder_service.model.qwen import Qwen3Encoder
from zimage_core.errors import InvalidModel, InvalidSettings
from zimage_core.formats import encoder_gguf, weights
from zimage_core.formats.encoder_files import EncoderFiles, canonical_name
from zimage_core.serving import memory

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FAMILY = "qwen3"


def load(
    files: EncoderFiles,
    deepest: int,
    device: str,
    dtype: str,
    form: str = FULL,
    *,
    is_resident: bool = True,
) -> Qwen3Encoder:
    """Reads the weights up to the hidden state `deepest`, those of the layers' linears in a narrow
    form if one is given; "auto" chooses device and type. Those that are not resident stay in host
    memory, for whoever brings them to the device."""
    config = _config(files)
    if not -config.num_hidden_layers - 1 <= deepest <= -1:
        raise InvalidSettings(
            f"max_hidden_layer {deepest}: this encoder has {-config.num_hidden_layers - 1} "
            "(the token table) to -1 (after the final norm)",
            fields={"field": "max_hidden_layer", "given": str(deepest)},
        )
    with torch.device("meta"):
        encoder = Qwen3Encoder(config, deepest)
    _refuse_sliding_windows(files.weights, config, len(encoder.layers))
    stored = _stored(files, encoder)
    target = choose_device(device)
    if why := narrow.obstacle(form, target):
        raise InvalidSettings(
            f"weights {form}: {why}; take int8 or full", fields={"field": "weights", "given": form}
        )
    computing = choose_type(dtype, target, _widest(stored[name] for name in encoder.matrices()))
    place = target if is_resident else torch.device("cpu")
    narrowed = partial(narrow.linear, form=form, device=target) if form != FULL else None
    _read(encoder, files, narrowed, place, computing)
    encoder.rotary_emb.to(place)
    return encoder.requires_grad_(False).eval()


def choose_device(name: str) -> torch.device:
    """The device of that name, or the fastest one here for "auto"."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, here in available.items() if here), "cpu"))
    if not available.get(name, True):
        raise InvalidSettings(
            f"device {name}: this machine has none that torch {torch.__version__} can use",
            fields={"field": "device", "given": name},
        )
    return torch.device(name)


def choose_type(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The type of that name, or for "auto" the fastest one that costs nothing: a CPU multiplies
    bfloat16 fast only with instructions for it, and files that hold more would lose by it."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type != "cpu":
        return torch.bfloat16
    found = torch.cpu.get_capabilities()
    fast = any(found.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast and stored is torch.bfloat16 else torch.float32


def _widest(stored: Iterable[torch.dtype]) -> torch.dtype:
    """That holds what all of them do: float16 and bfloat16 together are float32's."""
    kinds = set(stored)
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _config(files: EncoderFiles) -> Qwen3Config:
    values = files.config()
    family = values.get("model_type")
    if family != _FAMILY:
        what = f"this is a {family} model; Z-Image's text encoder is {_FAMILY}"
        raise InvalidModel.at(files.weights, what, "FOREIGN_MODEL")
    try:
        return Qwen3Config.from_dict(dict(values))
    except Exception as error:  # whatever the library finds wrong with it
        raise InvalidModel.at(files.weights, f"its config is wrong: {error}") from error


def _refuse_sliding_windows(folder: Path, config: Qwen3Config, layer_count: int) -> None:
    kinds = set((config.layer_types or [])[:layer_count])
    if kinds - {"full_attention"}:
        raise InvalidModel.at(folder, f"layers of kind {sorted(kinds)} are not supported")


def _stored(files: EncoderFiles, encoder: Qwen3Encoder) -> dict[str, torch.dtype]:
    """The type in the files of every tensor the encoder needs; nothing but headers is read."""
    folder, found = files.weights, files.tensors()
    for name, parameter in encoder.state_dict().items():
        weight = found.get(name)
        if weight is None:
            raise InvalidModel.at(folder, f"no tensor {name} in these files")
        if weight.shape != tuple(parameter.shape):
            raise InvalidModel.at(
                folder,
                f"{name} is {list(weight.shape)}, but its config says {list(parameter.shape)}",
            )
        if weight.element_type not in _TYPES and not files.is_gguf:
            raise InvalidModel.at(
                folder, f"{name} is stored as {weight.element_type}", "ELEMENT_TYPE"
            )
    blocks = torch.bfloat16  # holds as much as a few bits do
    return {name: _TYPES.get(found[name].element_type, blocks) for name in encoder.state_dict()}


def _read(
    encoder: Qwen3Encoder,
    files: EncoderFiles,
    narrowed: Callable[[Tensor], nn.Module] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """One tensor at a time, straight to the device: never two copies of more than one."""
    linears = {f"{name}.weight": name for name in encoder.linears()} if narrowed else {}
    values = _blocks if files.is_gguf else _tensors
    if narrowed:
        for name, value in values(files, linears.keys(), device):
            encoder.set_submodule(linears[name], narrowed(value.to(dtype)))
        memory.give_back()
    wanted = encoder.state_dict()
    for name, value in values(files, wanted.keys(), device):
        wanted[name] = value.to(dtype)
    encoder.load_state_dict(wanted, assign=True)


def _tensors(
    files: EncoderFiles, names: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """On a CPU they are parts of the mapped file, which stays mapped as long as one of them is."""
    for path in weights.files(files.weights):
        with safe_open(path, "pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                canonical = canonical_name(name)
                if canonical in names:
                    yield canonical, file.get_tensor(name)


def _blocks(
    files: EncoderFiles, names: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in files.tensors().items():
        if name in names:
            values = encoder_gguf.values(files.weights, name, weight)
            yield name, torch.from_numpy(values).to(device)
