"""A prompt before and after encoding, as plain data: what users, files and the wire speak of."""

from dataclasses import dataclass

from zimage_core.tensors import TensorData

CHAT_FORMAT = 1
"""The version of the chat format around a prompt."""

DEFAULT_HIDDEN_LAYER = -2

Blend = tuple[tuple[int, float], ...]
"""Hidden states of the encoder, counted from the end and the deepest last, with the part that each
has; the parts add up to 1."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to be encoded, with the parts of the chat format around it."""

    text: str
    system: str = ""
    thinking: str = ""
    assistant: str = ""
    force_think_block: bool = False
    strip_quotes: bool = False
    hidden_layer: int | None = None

    @property
    def effective_layer(self) -> int:
        """The entry of the hidden states that is taken, counted from the end."""
        return DEFAULT_HIDDEN_LAYER if self.hidden_layer is None else self.hidden_layer

    @property
    def effective_blend(self) -> Blend:
        """The states that its embedding is made of."""
        return ((self.effective_layer, 1.0),)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a text became token ids and which of the encoder's states were taken."""

    chat_format: int
    hidden_layer: int
    token_limit: int


@dataclass(frozen=True, slots=True)
class Numerics:
    """In which arithmetic an encoder ran."""

    compute_type: str
    weight_type: str
    engine: str
    device: str


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt after encoding: what the DiT is conditioned by."""

    tensor: TensorData
    """[token_count, width] in the encoder's compute type."""
    identity: str
    """The encoder's digest at the layer used."""
    recipe: Recipe
    numerics: Numerics
    token_count: int
    token_ids_sha256: str
