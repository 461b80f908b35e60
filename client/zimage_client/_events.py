"""What happens to a request, and what is known of a finished one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zimage_core.embeddings import Numerics, Recipe

Stage = Literal["sending", "queued", "encoding", "denoising", "decoding"]


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """What changes the model for a request."""

    name: str
    """By which it was asked for; empty where it was by its file."""
    sha256: str
    """Of its file."""
    scale: float
    """How strong it is: 1 is as it was trained."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What will really be run. Comes again when the request had to begin anew: the last counts."""

    width: int
    height: int
    seed: int
    """Of the first picture; picture i has seed + i."""
    count: int
    steps: int
    guidance: float
    schedule: str
    """"official" or "legacy"; empty when the noise levels were given."""
    shift: float
    sigmas: tuple[float, ...]
    """The noise levels after the shift, the final 0 included."""
    force_guidance: bool
    cfg_normalization: float
    cfg_truncation: float
    format: str
    quality: int | None
    metadata: str
    """"receipt" or "none"."""
    packing: str
    """"shared" or "solo": whether its steps may be shared with other requests."""
    previews: str
    """"latents" or "vae", whatever makes them; empty where none are wanted."""
    preview_interval: int
    """How many steps lie between two of them."""
    priority: str
    """"interactive", "normal" or "background"."""
    adapters: tuple[AdapterUse, ...]
    forward_count: int
    """How many DiT forwards the whole request takes, guidance included."""
    queue_position: int
    """How many requests came before this one and are not done."""
    expected_seconds: float | None
    """That it will take beside the others; None where nothing like it was made yet."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the request is. It may go back when the request had to begin anew. "sending" is this
    side's part: an adapter's file, which the service lacks."""

    stage: Stage
    index: int = 0
    """Which picture, counted from 0."""
    step: int = 0
    """How many steps of this picture are done."""
    steps: int = 0
    queue_position: int = 0
    """How many requests came before this one and are not done."""
    expected_seconds: float | None = None
    """That the rest will take beside the others; None where nobody knows yet."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Where a picture is heading after some of its steps."""

    index: int
    """Which picture, counted from 0."""
    step: int
    """How many steps of this picture are done."""
    width: int
    height: int
    """In pixels: not those of the picture."""
    data: bytes
    """A PNG file."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The request could not run; it is sent again after a pause."""

    reason: str
    message: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture: a whole file, its checksum verified."""

    index: int
    seed: int
    data: bytes
    media_type: str
    sha256: str
    pixels_sha256: str
    """Of its rows of 8-bit RGB."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A picture that was made of latents as they are."""

    data: bytes
    """The file."""
    media_type: str
    width: int
    height: int
    pixels_sha256: str
    """Of its rows of 8-bit RGB."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished picture by its digests."""

    sha256: str
    size_bytes: int
    media_type: str
    seed: int
    pixels_sha256: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a conditioning came from."""

    embedding_sha256: str
    identity: str
    """The encoder's digest; empty when nobody knows it."""
    identity_verified: bool
    """Whether the encoder is the one that the DiT pins: false when it pins none."""
    recipe: Recipe
    numerics: Numerics
    token_count: int
    worst_cosine: float | None = None
    """How near the encoder was measured to be to the one that the DiT pins; None: not measured."""


@dataclass(frozen=True, slots=True)
class NumericPlan:
    """Everything about the arithmetic that can move the last bits of a picture."""

    device: str
    compute_type: str
    vae_compute_type: str
    attention_backend: str
    thread_count: int
    library_versions: Mapping[str, str]
    packing: str
    """"shared" or "solo"; empty where no request is spoken of."""
    compiled: bool
    """Whether the transformer's blocks ran as compiled code."""
    vae_tile_px: int
    """The side of the VAE's tiles; 0 for what is usual."""
    weights: str
    """The form of the transformer's large weights, such as "full" or "fp8"."""
    fused_adapter: str
    """The SHA-256 of the adapter that is part of the weights; empty for none."""
    fused_adapter_scale: float
    learning: bool
    """Whether the model was there to be learnt: nobody has its weights of then."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took."""

    forward_count: int
    pixel_count: int
    artifact_bytes: int
    queue_seconds: float
    encode_seconds: float
    denoise_seconds: float
    """Its share of steps that others took part in."""
    decode_seconds: float
    mean_occupancy: float
    """How many requests took part in its steps, itself included, on average."""


@dataclass(frozen=True, slots=True)
class Completed:
    """All is done; always last."""

    artifacts: tuple[Artifact, ...]
    positive: Provenance
    negative: Provenance | None
    """None without guidance."""
    numeric_plan: NumericPlan
    usage: Usage


Event = Accepted | Progress | Preview | Waiting | Picture | Completed


@dataclass(frozen=True, slots=True)
class Generated:
    """All of a finished request."""

    pictures: tuple[Picture, ...]
    accepted: Accepted
    completed: Completed
