"""A prompt before and after encoding, as plain data: what users, files and the wire speak of."""

import math
from dataclasses import dataclass, replace

from zimage_core.tensors import TensorData

CHAT_FORMAT = 1
"""The version of the chat format around a prompt."""

DEFAULT_HIDDEN_LAYER = -2

Blend = tuple[tuple[int, float], ...]
"""Hidden states of the encoder, counted from the end, with the weight of each."""

INTERPOLATE, POOL, ATTENTION_POOL, TRUNCATE = "interpolate", "pool", "attention_pool", "truncate"
LONG_PROMPT_MODES = (INTERPOLATE, POOL, ATTENTION_POOL, TRUNCATE)
"""How an embedding comes to have no more rows than the DiT takes."""


_LARGEST_SHARE = 1e3
"""Of a state in a blend, either way: more is made of weights that cancel."""


def check_blend(blend: Blend) -> None:
    """Raises ValueError for one whose parts cannot add up to 1."""
    if not blend:
        return
    layers, weights = [layer for layer, _ in blend], [weight for _, weight in blend]
    if len(set(layers)) < len(layers):
        raise ValueError(f"blend: {layers} given, each hidden layer is allowed once")
    total = sum(weights)
    if not 0 < total < math.inf or max(map(abs, weights)) > _LARGEST_SHARE * total:
        raise ValueError(
            f"blend: the weights {weights} given; allowed is a sum of more than 0, of which none "
            f"is more than {_LARGEST_SHARE:g} times"
        )


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
    blend: Blend = ()
    """Several hidden states in place of one: pairs of a state and its weight."""
    token_limit: int | None = None
    """The longest text, in tokens; unset: what the encoder takes."""
    long_prompt_mode: str | None = None
    """What becomes of a text of more tokens than the DiT takes; unset: interpolate."""

    def __post_init__(self) -> None:
        """Raises ValueError for a blend that is none."""
        check_blend(self.blend)

    @property
    def effective_blend(self) -> Blend:
        """The states that its embedding is made of, the deepest last, with weights whose sum
        is 1."""
        if not self.blend:
            return (
                (DEFAULT_HIDDEN_LAYER if self.hidden_layer is None else self.hidden_layer, 1.0),
            )
        total = sum(weight for _, weight in self.blend)
        return tuple(sorted((layer, weight / total) for layer, weight in self.blend if weight))

    @property
    def effective_layer(self) -> int:
        """The deepest of them."""
        return self.effective_blend[-1][0]

    @property
    def effective_mode(self) -> str:
        """What becomes of it if it is long."""
        return self.long_prompt_mode or INTERPOLATE

    def decided(self) -> "Prompt":
        """The same with nothing left open that the encoder does not decide."""
        layer = None if self.blend else self.effective_layer
        blend = self.effective_blend if self.blend else ()
        return replace(self, hidden_layer=layer, blend=blend, long_prompt_mode=self.effective_mode)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a text became token ids and which of the encoder's states were taken."""

    chat_format: int
    hidden_layer: int
    """The deepest."""
    token_limit: int
    blend: Blend = ()
    """All of them where they are several, with weights whose sum is 1."""
    long_prompt_mode: str = ""
    row_limit: int = 0
    """The most rows; 0 and an empty mode where nobody knows."""

    def __post_init__(self) -> None:
        """Raises ValueError for a blend that is none."""
        check_blend(self.blend)

    def row_count(self, token_count: int) -> int:
        """Of the embedding of a text with so many tokens."""
        most = self.row_limit or token_count
        if self.long_prompt_mode == TRUNCATE:
            most = min(most, self.token_limit)
        return min(token_count, most)


def like(text: str, other: Prompt | Recipe) -> Prompt:
    """A prompt that is encoded in the same way: its prediction is compared with the other's."""
    return Prompt(
        text,
        hidden_layer=None if other.blend else other.hidden_layer,
        blend=other.blend,
        token_limit=other.token_limit if isinstance(other, Prompt) else None,
        long_prompt_mode=other.long_prompt_mode or None,
    )


@dataclass(frozen=True, slots=True)
class Numerics:
    """In which arithmetic an encoder ran."""

    compute_type: str
    weight_type: str
    engine: str
    device: str
    weights: str = "full"
    """The form of the layers' weights: full, in the weight type; int8 and the like, narrower."""

    def __str__(self) -> str:
        """For people."""
        held = self.weight_type if self.weights == "full" else self.weights
        return f"{self.device}, {self.compute_type}, weights {held}"


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt after encoding: what the DiT is conditioned by."""

    tensor: TensorData
    """[rows, width] in the encoder's compute type: a row for each token, unless there were more
    than the recipe's row limit."""
    identity: str
    """The encoder's digest at the layer used."""
    recipe: Recipe
    numerics: Numerics
    token_count: int
    token_ids_sha256: str
