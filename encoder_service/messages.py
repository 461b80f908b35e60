"""What the encoder's front and worker say to each other."""

from dataclasses import dataclass

from zimage_core.tensors import TensorData


@dataclass(frozen=True, slots=True)
class Encode:
    """Front to worker: the prompts of one call as token ids, with the hidden state each wants."""

    token_ids: tuple[tuple[int, ...], ...]
    hidden_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Worker to front: the embeddings of a call, in order."""

    embeddings: tuple[TensorData, ...]
    seconds: float
    """What the call took on the device."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Worker to front: what was loaded."""

    identities: dict[int, str]
    """The identity of each hidden state, by its number from the end."""
    layer_count: int
    max_hidden_layer: int
    width: int
    compute_type: str
    weight_type: str
    engine: str
    device: str
