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
_OF_STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file as it is; of a folder, its weights in a file that says all, as long as the block
    lasts. Raises InvalidRequest for a folder of another kind."""
    if not path.is_dir():
        yield path
        return
    try:
        config = read_json_object(path / _CONFIG)
        if config.get("peft_type") != _KIND:
            what = f"this is a {config.get('peft_type')} of peft, and {_KIND} is what can be used"
            raise InvalidModel.at(path, what, "ADAPTER_KIND")
        settings = {name: config[name] for name in _OF_STRENGTH if name in config}
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / _WEIGHTS
            weights.copy(path / _WEIGHTS, file, {SETTINGS: json.dumps(settings)})
            yield file
    except OSError as error:
        raise InvalidRequest(
            f"{path}: {_WEIGHTS} and {_CONFIG} are wanted in a folder: {error.strerror}",
            reason="FILE",
            fields={"field": "file", "given": str(path)},
        ) from error
