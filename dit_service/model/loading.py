"""Model folders in diffusers' layout and single files, onto a device; what is wrong is said before
anything runs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_service.model import single_file, vae_file
from dit_service.model.config import TransformerConfig
from dit_service.model.fusing import Fusion
from dit_service.model.narrow import AS_STORED, SCALE, full_shape
from dit_service.model.stored import Stored
from dit_service.model.transformer import ZImageTransformer
from dit_service.model.vae import Vae
from zimage_core import files
from zimage_core.errors import InvalidModel, InvalidSettings
from zimage_core.formats import weights
from zimage_core.formats.json_object import read_json_object
from zimage_core.planning import memory
from zimage_core.planning.linears import block_linears
from zimage_core.planning.memory import FULL

_WEIGHTS = "diffusion_pytorch_model"
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_OTHER_SIGMAS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Settings of diffusers' scheduler that no Z-Image uses; each would make another schedule."""


@dataclass(frozen=True)
class SchedulerConfig:
    """The constants of the schedule; the shift is static."""

    shift: float


@dataclass(frozen=True, slots=True)
class Residence:
    """How a transformer's weights lie on its device."""

    weights: str = AS_STORED
    """In which format."""
    room_bytes: float = math.inf
    """What they may take there; what does not fit stays in host memory until its turn comes."""


_WHOLE = Residence()


def read_config(model: Path) -> tuple[TransformerConfig, str]:
    """A model's sizes, and the form that keeps what its file holds of the large weights."""
    config, stored, _ = _single_file(model) if model.is_file() else _folder(model)
    return config, stored


def stamp(model: Path) -> str:
    """Another one after every change of the transformer's files."""
    paths = [model] if model.is_file() else weights.files(model / "transformer", _WEIGHTS)
    return f"{model.resolve()} {[files.stamp(path) for path in paths]}"


@torch.inference_mode(mode=False)
@torch.no_grad()
def load_transformer(
    model: Path,
    device: torch.device,
    dtype: torch.dtype,
    residence: Residence = _WHOLE,
    fusion: Fusion | None = None,
) -> ZImageTransformer:
    """Reads the transformer of a folder or a single file, tensor by tensor onto the device. What
    inference mode makes could not be trained with."""
    config, stored, tensors = _single_file(model) if model.is_file() else _folder(model)
    kept = stored if residence.weights == AS_STORED else residence.weights
    with torch.device("meta"):
        transformer = ZImageTransformer(config)
        if kept != FULL:
            transformer.make_narrow(kept)
    turning = _turning_blocks(transformer, dtype, residence.room_bytes)
    hosted = {f"{block}.{linear}" for block in turning for linear in block_linears(config)}
    wanted = transformer.state_dict()
    loaded: dict[str, Tensor] = {}
    for name, read in tensors:
        _check_tensor(name, read.values, wanted, model)
        one = fusion.into(name, read) if fusion else read
        module, _, _ = name.rpartition(".")
        place = torch.device("cpu") if module in hosted else device
        if f"{module}.{SCALE}" in wanted:
            weight, scale = one.narrow(device, wanted[name].dtype)
            loaded[name], loaded[f"{module}.{SCALE}"] = weight.to(place), scale.to(place)
        else:
            loaded[name] = one.full(place, dtype)
    missing = sorted(wanted.keys() - loaded.keys())
    if missing:
        what = f"{len(missing)} weights are missing, the first is {missing[0]}"
        raise InvalidModel.at(model, what, "WEIGHTS_MISSING")
    transformer.load_state_dict(loaded, assign=True)
    del loaded  # or the host would hold what takes turns twice
    transformer.stream(turning)
    return transformer.eval().requires_grad_(False)


@torch.no_grad()
def restore_transformer(transformer: ZImageTransformer, model: Path) -> None:
    """Makes all weights of one that was loaded whole what they were then."""
    _, _, tensors = _single_file(model) if model.is_file() else _folder(model)
    weights = transformer.state_dict()
    for name, read in tensors:
        weights[name].copy_(read.full(transformer.device, transformer.dtype))


def load_vae(
    model: Path,
    device: torch.device,
    dtype: torch.dtype,
    vae: Path | None = None,
    tile_px: int | None = None,
) -> Vae:
    """Reads the VAE: that of the model folder, or another, in a folder or a single file."""
    if vae is None:
        _check_family(model)
    path = vae or model / "vae"
    try:
        if path.is_file():
            loaded: Any = vae_file.read(path, dtype)
        else:
            _check_class(read_json_object(path / "config.json"), "AutoencoderKL", path)
            loaded = AutoencoderKL.from_pretrained(
                path, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidModel.at(path, f"the VAE cannot be loaded: {error}") from error
    return Vae(loaded.to(device), tile_px)


def read_scheduler(folder: Path) -> SchedulerConfig:
    """Reads `scheduler/`; settings that make another schedule are refused by name."""
    _check_family(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    values = read_json_object(path)
    _check_class(values, _SCHEDULER, path)
    for name in _OTHER_SIGMAS:
        if values.get(name):
            what = f"{name}={values[name]} is not a Z-Image schedule"
            raise InvalidModel.at(path, what, "SCHEDULER_UNSUPPORTED")
    try:
        return SchedulerConfig(float(values["shift"]))
    except KeyError as missing:
        what = f"the scheduler's config has no {missing}"
        raise InvalidModel.at(path, what, "CONFIG_INCOMPLETE") from None


def _folder_config(path: Path) -> TransformerConfig:
    values = read_json_object(path)
    try:
        return TransformerConfig.from_values(values)
    except InvalidModel as error:
        raise InvalidModel.at(path, error.message, error.reason) from None


def _check_family(folder: Path) -> None:
    if not folder.is_dir():
        raise InvalidModel.at(folder, "there is no such model folder or file", "FILE_MISSING")
    index = folder / "model_index.json"
    if not index.is_file():
        return
    class_name = str(read_json_object(index).get("_class_name"))
    if not class_name.startswith("ZImage"):
        what = f"this is a {class_name}, and a ZImagePipeline is wanted"
        raise InvalidModel.at(folder, what, "FOREIGN_MODEL")


def _check_class(values: Mapping[str, Any], wanted: str, path: Path) -> None:
    class_name = values.get("_class_name")
    if class_name != wanted:
        what = f"this is a {class_name}, and {wanted} is wanted"
        raise InvalidModel.at(path, what, "FOREIGN_MODEL")


def _turning_blocks(
    transformer: ZImageTransformer, dtype: torch.dtype, room_bytes: float
) -> list[str]:
    """Which blocks take turns on the device."""
    wanted = memory.weight_bytes(transformer.config, dtype.itemsize, transformer.weights)
    try:
        count = memory.turn_count(wanted, room_bytes)
    except ValueError as error:
        raise InvalidSettings(
            f"max_weight_bytes: {error}; narrow weights (weights = fp8 or int8) take less",
            reason="WEIGHT_MEMORY",
            fields={"field": "max_weight_bytes", "given": f"{room_bytes:.0f}"},
        ) from error
    return memory.turning_blocks(transformer.config, count)


def _check_tensor(name: str, weight: Tensor, wanted: Mapping[str, Tensor], folder: Path) -> None:
    if name not in wanted or name.endswith(f".{SCALE}"):
        what = f"the weight {name} belongs to another model"
        raise InvalidModel.at(folder, what, "WEIGHTS_UNKNOWN")
    shape = full_shape(wanted[name])
    if tuple(weight.shape) != shape:
        what = f"the weight {name} is {list(weight.shape)}, by its config {list(shape)}"
        raise InvalidModel.at(folder, what, "WEIGHTS_MISSHAPEN")


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return tensor
    what = f"{name} is stored as {tensor.dtype}: narrow weights are read from single files alone"
    raise InvalidModel.at(path, what, "QUANTIZED")


_Read = tuple[TransformerConfig, str, Iterator[tuple[str, Stored]]]
"""A model's config, the format of its weights, and they themselves."""


def _folder(folder: Path) -> _Read:
    _check_family(folder)
    config = _folder_config(folder / "transformer" / "config.json")
    return config, FULL, _tensors(weights.files(folder / "transformer", _WEIGHTS))


def _single_file(path: Path) -> _Read:
    contents = single_file.contents(path)
    config = single_file.read_config(path, contents.shapes)
    renamed = (one for pair in contents.read() for one in single_file.renamed(*pair))
    return config, contents.weights, renamed


def _tensors(paths: Iterable[Path]) -> Iterator[tuple[str, Stored]]:
    """Every tensor, mapped rather than read; a file is closed before the next opens."""
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - an open file is no mapping
                    yield name, Stored(_plain(path, name, tensors.get_tensor(name)))
        except SafetensorError as error:
            raise InvalidModel.at(path, f"the weights cannot be read: {error}") from error
