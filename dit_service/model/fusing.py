"""An adapter that becomes part of the weights as these are loaded: for one that all pictures shall
have. No file changes, so a service that is started without it has exactly the model it had."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_service.model.adapter_loading import load_adapter, place_of
from dit_service.model.adapters import Adapter
from dit_service.model.stored import Stored
from zimage_core.errors import InvalidRequest, InvalidSettings
from zimage_core.planning.flops import DitShape

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Fusion:
    """An adapter, how strong it shall be, and the digest of its file."""

    adapter: Adapter
    scale: float
    sha256: str

    @classmethod
    def read(cls, path: Path, scale: float, shape: DitShape, device: torch.device) -> "Fusion":
        """Raises InvalidSettings for a file that cannot be used with a model of this shape."""
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(load_adapter(path, shape, device, torch.float32), scale, sha256)
        except (InvalidRequest, OSError) as error:
            raise InvalidSettings(
                f"fused_adapter {path}: {error}",
                reason="FUSED_ADAPTER",
                fields={"field": "fused_adapter", "given": str(path)},
            ) from error

    def into(self, name: str, stored: Stored) -> Stored:
        """A weight with what the adapter adds to it, summed in float32 and rounded once, later."""
        linear = name.removesuffix(_WEIGHT)
        if linear == name:
            return stored
        try:
            part, inner = place_of(linear)
            change = self.adapter.parts[part][inner]
        except KeyError:
            return stored
        weight_OI = stored.full(change.up_OR.device, torch.float32)
        strength = self.scale * change.strength
        return Stored(weight_OI.addmm_(change.up_OR, change.down_RI, alpha=strength))
