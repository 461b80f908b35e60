"""Model folders in diffusers' layout and single files, onto a device; what is wrong is said before
anything runs."""

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
from dit_service.model.transformer import ZImageTransformer
from dit_service.model.vae import Vae
from zimage_core.errors import InvalidModel
from zimage_core.formats import weights
from zimage_core.formats.json_object import read_json_object

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


def load_transformer(model: Path, device: torch.device, dtype: torch.dtype) -> ZImageTransformer:
    """Reads the transformer of a folder or a single file, tensor by tensor onto the device."""
    config, tensors = _single_file(model) if model.is_file() else _folder(model)
    with torch.device("meta"):
        transformer = ZImageTransformer(config)
    wanted = {name: weight.shape for name, weight in transformer.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for name, weight in tensors:
        _check_tensor(name, weight, wanted, model)
        # Copied even where nothing changes: a view would need the file for as long as it lives.
        loaded[name] = weight.to(device, dtype, copy=True)
    missing = sorted(wanted.keys() - loaded.keys())
    if missing:
        what = f"{len(missing)} weights are missing, the first is {missing[0]}"
        raise InvalidModel.at(model, what, "WEIGHTS_MISSING")
    transformer.load_state_dict(loaded, assign=True)
    return transformer.eval().requires_grad_(False)


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


def _read_config(path: Path) -> TransformerConfig:
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


def _check_tensor(
    name: str, weight: Tensor, wanted: Mapping[str, torch.Size], folder: Path
) -> None:
    if name not in wanted:
        what = f"the weight {name} belongs to another model"
        raise InvalidModel.at(folder, what, "WEIGHTS_UNKNOWN")
    if weight.shape != wanted[name]:
        what = f"the weight {name} is {list(weight.shape)}, by its config {list(wanted[name])}"
        raise InvalidModel.at(folder, what, "WEIGHTS_MISSHAPEN")


_Named = Iterator[tuple[str, Tensor]]


def _folder(folder: Path) -> tuple[TransformerConfig, _Named]:
    _check_family(folder)
    config = _read_config(folder / "transformer" / "config.json")
    return config, _tensors(weights.files(folder / "transformer", _WEIGHTS))


def _single_file(path: Path) -> tuple[TransformerConfig, _Named]:
    config = single_file.read_config(path)
    return config, (one for pair in _tensors([path]) for one in single_file.renamed(*pair))


def _tensors(paths: Iterable[Path]) -> _Named:
    """Every tensor, mapped rather than read; a file is closed before the next opens."""
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - an open file is no mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise InvalidModel.at(path, f"the weights cannot be read: {error}") from error
