"""The JSON objects in model folders: configs, indexes, the headers of weight files."""

import json
from pathlib import Path
from typing import Any

from zimage_core.errors import InvalidModel


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file; raises InvalidModel for one that is missing or holds something else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InvalidModel.at(path, "this file is missing", "FILE_MISSING") from None
    except OSError as error:
        raise InvalidModel.at(path, f"cannot be read: {error.strerror}") from error
    return parse_json_object(path, data)


def parse_json_object(path: Path, data: bytes) -> dict[str, Any]:
    """The object in a part of a file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidModel.at(path, f"no readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel.at(path, "a JSON object was expected")
    return value
