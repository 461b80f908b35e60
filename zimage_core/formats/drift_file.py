"""How far other encoders are from the one that a DiT belongs to: what `verify-encoder` measured."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zimage_core.embeddings import Numerics
from zimage_core.errors import InvalidSettings
from zimage_core.files import write_whole


class Drift(BaseModel):
    """Of one encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pinned: str
    """The identity of the encoder that it was held against."""
    identity: str
    numerics: Numerics
    worst_cosine: float = Field(ge=-1, le=1.000001)
    """Of the token that differs most, over all probes."""
    mean_cosine: float = Field(ge=-1, le=1.000001)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = Field(1, ge=1, le=1)
    drifts: list[Drift]


def read(path: Path) -> list[Drift]:
    """Raises InvalidSettings for a file that is none."""
    try:
        return _File.model_validate_json(path.read_bytes()).drifts
    except (OSError, ValidationError) as error:
        raise InvalidSettings(
            f"{path}: no file of `zimage-client verify-encoder --write`: {error}",
            fields={"field": "encoder_drifts", "given": str(path)},
        ) from error


def add(path: Path, drift: Drift) -> None:
    """Takes the place of an earlier measurement of the same."""
    known = read(path) if path.exists() else []
    others = [one for one in known if _key(one) != _key(drift)]
    said = _File(format=1, drifts=[*others, drift]).model_dump(mode="json")
    write_whole(path, (json.dumps(said, indent=1) + "\n").encode())


def _key(drift: Drift) -> tuple[str, str, Numerics]:
    return drift.pinned, drift.identity, drift.numerics
