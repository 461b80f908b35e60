"""What the encoder's front and worker say to each other."""

from dataclasses import dataclass

from zimage_core.embeddings import Blend
from zimage_core.tensors import TensorData


@dataclass(frozen=True, slots=True)
class Encode:
    """Front to worker: a prompt as token ids, with the hidden states that it wants."""

    token_ids: tuple[int, ...]
    blend: Blend
    caller: int
    """Who asks: callers have their turns."""
    is_solo: bool
    """Whether nobody else's prompts may be in the same run or have been before."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Worker to front: the embedding of a prompt."""

    tensor: TensorData
    seconds: float
    """Of the device: the prompt's share of its batch."""
    reused_tokens: int
    """That had run before, at the beginning of another prompt."""
    batch_prompts: int


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
    weights: str
    """The form of the layers' weights, as the setting names it."""
    engine: str
    device: str
