"""What services say of themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

from zimage_client._events import NumericPlan
from zimage_core.embeddings import Numerics, Recipe


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The process of a service that computes."""

    state: str
    """"loading", "idle" or "working"; empty for one that is newer than this client."""
    work: str
    """The piece of work at hand, such as "denoise"."""
    call_count: int
    restart_count: int
    """How often it died or hung and was replaced."""
    load_seconds: float
    """From the start of its process until it could serve; 0 while it loads."""
    memory_bytes: Mapping[str, int]
    """What its process holds: "host", "device" and "device_reserved" now, "host_peak" and
    "device_peak" at most; empty while it loads."""


@dataclass(frozen=True, slots=True)
class Model:
    """The model of a DiT service, with what a picture without wishes gets."""

    name: str
    variant: str
    """"turbo" or "base"; empty for one that is newer than this client."""
    shift: float
    caption_width: int
    encoder_identity: str
    """The digest of the only encoder whose embeddings it takes; empty when it takes any."""
    default_side_px: int
    default_steps: int
    default_guidance: float
    preview_r_squared: float
    """How much a linear map of its latents tells of a picture: previews need 0.5."""
    vae_sha256: str
    """Over the weights of its VAE: what latents belong to."""
    full_training: bool
    """Whether its weights are there to be learnt: pictures are drawn with what they are by now."""


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """A way to compute attention that a DiT service knows."""

    name: str
    chosen: bool
    reason: str
    """Why it is in use, or why not."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be asked of a DiT service."""

    side_multiple_px: int
    max_side_px: int
    max_token_count: int
    max_count: int
    max_steps: int
    max_queue_length: int


@dataclass(frozen=True, slots=True)
class DitDescription:
    """A DiT service; while it loads, what only the loaded model tells is None."""

    version: str
    ready: bool
    has_encoder: bool
    """Whether it takes prompts; without an encoder it takes embeddings alone."""
    model: Model | None
    limits: Limits | None
    numeric_plan: NumericPlan | None
    worker: WorkerState
    features: tuple[str, ...]
    """What its version can do that another may not."""
    attention_backends: tuple[AttentionBackend, ...]
    compilation: str
    """Why blocks run compiled, or why not."""
    weights_reason: str
    """Why the transformer's large weights are in the form they are in."""
    streamed_block_count: int
    """Blocks whose weights are in host memory and come to the device for their turn."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA that has a name."""

    name: str
    sha256: str
    """Of its file."""
    size_bytes: int
    rank: int
    """The highest of its changes; 0 in a list."""
    linear_count: int
    """How many linears it changes; 0 in a list."""
    metadata: Mapping[str, str]
    """What its file says of itself; empty in a list."""


@dataclass(frozen=True, slots=True)
class SpanPart:
    """Where a request was in a piece of work."""

    request_id: str
    """As in logs."""
    image_index: int
    step: int
    """Counted from 1; 0 for what is no step."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work on the device of a DiT service."""

    work: str
    """"condition", "denoise", "decode" or "encode", or what a newer service knows."""
    ended_seconds_ago: float
    took_seconds: float
    parts: tuple[SpanPart, ...]
    """The requests it was done for; several share a step."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What the device of a DiT service did of late."""

    spans: tuple[Span, ...]
    """In the order in which they ended."""
    memory_bytes: int
    """What tensors take of a GPU's memory now; of a CPU's, what the worker's process takes."""
    peak_memory_bytes: int
    """And took at the most since the trace before, whoever asked for that."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """The model of an encoder service."""

    identity: str
    """At the usual hidden layer, or the deepest computed if that is less deep."""
    recipe: Recipe
    numerics: Numerics
    width: int
    layer_count: int
    max_hidden_layer: int
    max_prompt_count: int


@dataclass(frozen=True, slots=True)
class TokenCount:
    """How long a prompt is."""

    token_count: int
    """Of the text, the chat's own included."""
    token_limit: int
    """How many it may have; with more it would be refused, or cut if that is its mode."""
    row_count: int
    """Of the embedding it would have; 0 where it would be refused."""


@dataclass(frozen=True, slots=True)
class EncoderDescription:
    """An encoder service; while it loads, what only the loaded model tells is None."""

    version: str
    ready: bool
    model: Encoder | None
    worker: WorkerState
    features: tuple[str, ...]
    """What its version can do that another may not."""
