"""What the DiT service's front and worker say to each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage_core.planning.flops import DitShape
from zimage_core.planning.shares import COMMON, Share
from zimage_core.planning.training import TrainingPlan
from zimage_core.planning.training_memory import Rows, TrainingBytes
from zimage_core.tensors import TensorData

TRAINING_TAKEN = "TRAINING_TAKEN"
"""The reason of the error when others leave no room for a training."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Front to worker: pictures that differ in their seed alone, every setting decided."""

    positive: TensorData
    negative: TensorData | None
    """None unless guidance is on."""
    seeds: tuple[int, ...]
    width_px: int
    height_px: int
    sigmas: tuple[float, ...]
    """After the shift, the final 0 included."""
    guidance: float
    cfg_normalization: float
    cfg_truncation: float
    is_solo: bool
    """Whether its steps are shared with nobody."""
    share: Share = COMMON
    previews: "Previews | None" = None
    adapters: "tuple[AdapterUse, ...]" = ()

    @property
    def token_count(self) -> int:
        """Of both conditionings together."""
        sides = (self.positive, self.negative)
        return sum(side.shape[0] for side in sides if side is not None)


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """Part of Generate: an adapter, and how strong it shall be."""

    sha256: str
    """Of its file."""
    size_bytes: int
    """Its size."""
    file: Path
    """On this machine."""
    scale: float


@dataclass(frozen=True, slots=True)
class Previews:
    """Part of Generate: pictures of how it goes on."""

    interval_steps: int
    use_vae: bool
    """Rather than the linear map."""


@dataclass(frozen=True, slots=True)
class EncodeImage:
    """Front to worker: a picture whose latents are wanted; answered by one TensorData."""

    width_px: int
    height_px: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class DecodeLatents:
    """Front to worker: latents whose picture is wanted; answered by one Picture."""

    latents: TensorData


@dataclass(frozen=True, slots=True)
class OpenTraining:
    """Front to worker: a training begins or goes on here; answered by one TrainingOpened."""

    session: str
    """A name that no other training has or had."""
    plan: TrainingPlan
    state: tuple[Path, ...]
    """The files to go on from; none for one that begins."""
    beside: Path | None
    """The file of the adapter that is active meanwhile."""
    largest: tuple[Rows, ...] = ()
    """A batch that takes as much as any: what the plan leaves open is decided by it."""
    low_memory: bool = False
    """Whether samples are read from disk each time."""
    batch_is_open: bool = False
    """Whether batches are as large as there is room for at once, rather than the largest."""


@dataclass(frozen=True, slots=True)
class TrainingOpened:
    """Worker to front: how far a training is."""

    step: int
    parameter_count: int
    plan: TrainingPlan
    """With everything decided."""
    batch_size: int
    """What all devices compute at once."""


@dataclass(frozen=True, slots=True)
class PlanTraining:
    """Front to worker: a training is thought of; answered by one TrainingForecast."""

    plan: TrainingPlan
    largest: tuple[Rows, ...]
    """A batch that takes as much as any."""
    batch_is_open: bool
    """As of OpenTraining."""


@dataclass(frozen=True, slots=True)
class TrainingForecast:
    """Worker to front: what would become of a training."""

    plan: TrainingPlan
    """With everything decided."""
    batch_size: int
    parameter_count: int
    taken: TrainingBytes
    """Of each device, at the peak."""
    room_bytes: float
    """What trainings may take beside the frozen model; infinite where nothing bounds it."""
    step_seconds: float | None
    """Of the largest batch, when nothing else is done; None where it could not be tried."""


@dataclass(frozen=True, slots=True)
class Learn:
    """Front to worker: the next step of a training; answered by one Learnt."""

    session: str
    step: int
    samples: "tuple[TrainSample, ...]"
    share: Share


@dataclass(frozen=True, slots=True)
class TrainSample:
    """Part of Learn: a picture and its caption, as files of this machine by their digests."""

    latents: "tuple[str, Path]"
    caption: "tuple[str, Path]"
    weight: float


@dataclass(frozen=True, slots=True)
class Learnt:
    """Worker to front: what came of a step."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    is_taken: bool
    seconds: float
    waited_seconds: float
    device_bytes: int | None
    """What the device held at most since the last step of any training, for pictures, too; None
    where it does not tell."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Front to worker: samples that a training looks at and does not learn; answered by one
    Evaluated."""

    session: str
    first: int
    """The place of the first of them."""
    samples: "tuple[TrainSample, ...]"
    share: Share


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Worker to front: what was lost on them."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class TakeCheckpoint:
    """Front to worker: what is there of a training shall be written into a folder; answered by one
    Checkpoint."""

    session: str
    folder: Path
    about: Mapping[str, str]
    """What the adapter's file says of itself."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Worker to front: a checkpoint's files, whole."""

    step: int
    weights: Path
    state: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class CloseTraining:
    """Front to worker: a training goes on elsewhere, or not at all; answered by nothing."""

    session: str


@dataclass(frozen=True, slots=True)
class Recall:
    """Front to worker: what it did of late is wanted; answered by one Recalled."""

    last_seconds: float | None
    """How far back; None for all that is remembered."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """Worker to front: what it did of late, in the order in which it ended."""

    spans: "tuple[Span, ...]"
    until: float
    """When this was."""
    memory_bytes: int
    """What was taken of the device then."""
    peak_memory_bytes: int
    """And at the most since it was asked before."""


@dataclass(frozen=True, slots=True)
class Span:
    """Part of Recalled: a piece of work on the device."""

    work: str
    began: float
    """By the worker's monotonic clock, in seconds."""
    seconds: float
    parts: "tuple[Part, ...]"
    """Those it was done for."""


@dataclass(frozen=True, slots=True)
class Part:
    """Part of Span: where a request was."""

    request_id: str
    image_index: int = 0
    step: int = 0
    """Counted from 1; 0 for what is no step."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """Worker to front: a picture has this many steps behind it; 0 when its turn begins."""

    image_index: int
    step: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """Worker to front: the VAE turns to a picture."""

    image_index: int


@dataclass(frozen=True, slots=True)
class Picture:
    """Worker to front: a finished picture as rows of 8-bit RGB."""

    image_index: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class Preview:
    """Worker to front: where a picture is heading, as rows of 8-bit RGB."""

    image_index: int
    step: int
    width_px: int
    height_px: int
    rgb: bytes


@dataclass(slots=True)
class Spent:
    """Worker to front: what a call took; the last of its events."""

    step_count: int = 0
    forward_count: int = 0
    denoise_seconds: float = 0.0
    """Its share of steps that others took part in."""
    decode_seconds: float = 0.0
    occupancy: int = 0
    """The number of requests in each of its steps, summed over them."""

    def count(self, forwards: int, seconds: float, request_count: int) -> None:
        """Enters one step."""
        self.step_count += 1
        self.forward_count += forwards
        self.denoise_seconds += seconds
        self.occupancy += request_count


@dataclass(frozen=True, slots=True)
class Model:
    """Worker to front: what was loaded."""

    name: str
    variant: str
    shift: float
    shape: DitShape
    caption_width: int
    max_token_count: int
    side_multiple_px: int
    max_side_px: int
    default_side_px: int
    encoder_identities: dict[int, str]
    """The encoder beside the model at each of its hidden states, by their numbers from the end;
    empty where none lies."""
    device: str
    compute_type: str
    vae_compute_type: str
    fused_adapter: str
    """The digest of the adapter that is part of the weights; empty without."""
    fused_adapter_scale: float
    weights: str
    """The form that the transformer's large weights are in."""
    weights_reason: str
    streamed_block_count: int
    """How many blocks take turns on the device."""
    attention_backend: str
    attention_reasons: dict[str, str]
    """Why each backend is in use or is not, by name."""
    is_compiled: bool
    compilation_reason: str
    vae_sha256: str
    """Over its weights and constants."""
    is_learnt: bool
    """Whether its weights are there for full trainings."""
    vae_tile_px: int
    """0 for what is usual."""
    preview_r_squared: float
    latent_channels: int
    pixels_per_latent: int
    """Along a side."""
    thread_count: int
    library_versions: dict[str, str]
