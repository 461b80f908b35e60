"""Folders in which peft saves a LoRA: the strength of its file stands in another one beside it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from zimage_core.errors import InvalidModel, InvalidRequest
from zimage_core.formats import weights
from zimage_core.formats.adapter_file import SETTINGS
from zimage_core.formats.json_object import read_json_object

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KIND = "LORA"
_OF_STRENGTH = ("lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file as it is; of such a folder, or its weights, a file that says all, as long as the block
    lasts. Raises InvalidRequest for a folder of another kind."""
    folder = path if path.is_dir() else path.parent
    if path != folder and (path.name != _WEIGHTS or not (folder / _CONFIG).is_file()):
        yield path
        return
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / _WEIGHTS
        _write(folder, file)
        yield file


def _write(folder: Path, file: Path) -> None:
    config = read_json_object(folder / _CONFIG)
    if config.get("peft_type") != _KIND:
        what = f"this is a {config.get('peft_type')} of peft, and {_KIND} is what can be used"
        raise InvalidModel.at(folder, what, "ADAPTER_KIND")
    settings = {name: config[name] for name in _OF_STRENGTH if name in config}
    try:
        weights.copy(folder / _WEIGHTS, file, {SETTINGS: json.dumps(settings)})
    except OSError as error:
        raise InvalidRequest(
            f"{folder}: {_WEIGHTS} and {_CONFIG} are wanted in a folder: {error.strerror}",
            reason="FILE",
            fields={"field": "file", "given": str(folder)},
        ) from error
