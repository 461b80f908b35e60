"""Model folders in diffusers' layout, onto a device; what is wrong is said before anything runs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_service.model.config import TransformerConfig
from dit_service.model.transformer import ZImageTransformer
from dit_service.model.vae import Vae
from zimage_core.errors import InvalidModel

_WEIGHTS = "diffusion_pytorch_model.safetensors"
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


def load_transformer(folder: Path, device: torch.device, dtype: torch.dtype) -> ZImageTransformer:
    """Reads `transformer/`, one file or many, tensor by tensor onto the device."""
    _check_family(folder)
    with torch.device("meta"):
        transformer = ZImageTransformer(_read_config(folder / "transformer" / "config.json"))
    wanted = {name: weight.shape for name, weight in transformer.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, weight in _tensors(folder / "transformer"):
        _check_tensor(name, weight, wanted, folder)
        # Copied even where nothing changes: a view would need the file for as long as it lives.
        weights[name] = weight.to(device, dtype, copy=True)
    missing = sorted(wanted.keys() - weights.keys())
    if missing:
        raise _invalid(
            "WEIGHTS_MISSING",
            f"{len(missing)} weights are missing, the first is {missing[0]}",
            folder,
        )
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> Vae:
    """Reads `vae/`."""
    _check_family(folder)
    _check_class(_read_json(folder / "vae" / "config.json"), "AutoencoderKL", folder / "vae")
    try:
        model: Any = AutoencoderKL.from_pretrained(
            folder / "vae", torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _invalid(
            "WEIGHTS_UNREADABLE", f"the VAE cannot be loaded: {error}", folder / "vae"
        ) from error
    return Vae(model.to(device))


def read_scheduler(folder: Path) -> SchedulerConfig:
    """Reads `scheduler/`; settings that make another schedule are refused by name."""
    _check_family(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    values = _read_json(path)
    _check_class(values, _SCHEDULER, path)
    for name in _OTHER_SIGMAS:
        if values.get(name):
            raise _invalid(
                "SCHEDULER_UNSUPPORTED", f"{name}={values[name]} is not a Z-Image schedule", path
            )
    try:
        return SchedulerConfig(float(values["shift"]))
    except KeyError as missing:
        raise _invalid(
            "CONFIG_INCOMPLETE", f"the scheduler's config has no {missing}", path
        ) from None


def _read_config(path: Path) -> TransformerConfig:
    values = _read_json(path)
    try:
        return TransformerConfig.from_values(values)
    except InvalidModel as error:
        raise _invalid(error.reason, error.message, path) from None


def _check_family(folder: Path) -> None:
    if not folder.is_dir():
        raise _invalid("MODEL_NOT_FOUND", "there is no such model folder", folder)
    index = folder / "model_index.json"
    if not index.is_file():
        return
    class_name = str(_read_json(index).get("_class_name"))
    if not class_name.startswith("ZImage"):
        raise _invalid(
            "FOREIGN_MODEL", f"this is a {class_name}, and a ZImagePipeline is wanted", folder
        )


def _check_class(values: Mapping[str, Any], wanted: str, path: Path) -> None:
    class_name = values.get("_class_name")
    if class_name != wanted:
        raise _invalid("FOREIGN_MODEL", f"this is a {class_name}, and {wanted} is wanted", path)


def _check_tensor(
    name: str, weight: Tensor, wanted: Mapping[str, torch.Size], folder: Path
) -> None:
    if name not in wanted:
        raise _invalid("WEIGHTS_UNKNOWN", f"the weight {name} belongs to another model", folder)
    if weight.shape != wanted[name]:
        raise _invalid(
            "WEIGHTS_MISSHAPEN",
            f"the weight {name} is {list(weight.shape)}, by its config {list(wanted[name])}",
            folder,
        )


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, mapped rather than read; a file is closed before the next opens."""
    for path in _weight_files(folder):
        if not path.is_file():
            raise _invalid("MODEL_NOT_FOUND", "the weights are missing", path)
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - an open file is no mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise _invalid(
                "WEIGHTS_UNREADABLE", f"the weights cannot be read: {error}", path
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{_WEIGHTS}.index.json"
    if not index.is_file():
        return [folder / _WEIGHTS]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise _invalid("CONFIG_MALFORMED", "the index has no weight_map", index)
    return [folder / str(file) for file in sorted(set(weight_map.values()))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise _invalid("MODEL_NOT_FOUND", "the file is missing", path) from None
    except (OSError, ValueError) as error:
        raise _invalid("CONFIG_MALFORMED", f"the file cannot be read: {error}", path) from error
    if not isinstance(values, dict):
        raise _invalid("CONFIG_MALFORMED", "the file holds no JSON object", path)
    return values


def _invalid(reason: str, message: str, path: Path) -> InvalidModel:
    return InvalidModel(f"{path}: {message}", reason=reason, fields={"path": str(path)})
