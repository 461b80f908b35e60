"""Jobs of a trainer service, as users see them."""

from dataclasses import dataclass
from datetime import datetime

from zimage_core.digests import Named
from zimage_core.errors import ZImageError
from zimage_core.planning.curriculum import best
from zimage_core.wire import names, status
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2


@dataclass(frozen=True, slots=True)
class TrainCheckpoint:
    """What there is of a job behind so many steps."""

    step: int
    weights: Named
    """The file of what was learnt in the trainer's store: an adapter, or the transformer."""
    state: tuple[Named, ...]
    """What training goes on from, in parts; empty where it is not kept any more."""
    created: datetime
    validation_loss: float | None = None
    """On pictures that are kept from learning, where there are any."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """A job as it is."""

    id: str
    name: str
    """Of the adapter."""
    state: str
    """"waiting", "running", "paused", "completed", "failed" or "cancelled"; empty for one that is
    newer than this client."""
    waits_for: str
    """Or why it rests where nobody asked for that; else empty."""
    failure: ZImageError | None
    step: int
    """How many are behind it."""
    step_count: int
    created: datetime
    updated: datetime
    checkpoints: tuple[TrainCheckpoint, ...]
    spec: trainer_pb2.TrainJobSpec
    """What was asked, everything decided."""

    @property
    def best(self) -> TrainCheckpoint | None:
        """The checkpoint that loses the least on what is kept from learning, or the latest where
        nothing is; it has the job's name in the end. None before the first."""
        losses = [one.validation_loss for one in self.checkpoints]
        return self.checkpoints[best(losses)] if losses else None

    @property
    def has_ended(self) -> bool:
        """Whether it does not go on by itself, ever."""
        return self.state in ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class TrainNeeds:
    """What a job takes of a DiT service's device, and how long."""

    parameter_count: int
    """How many numbers would be learnt."""
    weights_bytes: int
    """What the frozen model takes of the device."""
    learnt_bytes: int
    """What is learnt, and what the optimiser keeps of it."""
    step_bytes: int
    """What a step takes besides, at most."""
    room_bytes: int | None
    """What trainings may take beside the frozen model; None where nothing bounds it."""
    step_seconds: float | None
    """How long a step lasts when nothing else is done; None where it could not be tried."""


@dataclass(frozen=True, slots=True)
class TrainForecast:
    """What a job would be, take and last."""

    spec: trainer_pb2.TrainJobSpec
    """What would be learnt from what, everything decided that can be now."""
    needs: TrainNeeds | None
    """None where no DiT service that may learn it is there now."""
    waits_for: str
    """What the job would wait for; else empty."""
    warnings: tuple[str, ...]
    """What may not be as it was meant."""


@dataclass(frozen=True, slots=True)
class TrainStep:
    """What came of a step."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool
    seconds: float
    waited_seconds: float
    device_bytes: int | None = None
    """What the device's memory held at most since the step before, where it tells."""
    battery_percent: float | None = None
    """Of the machine that learns, as it tells itself, where it runs on one."""


@dataclass(frozen=True, slots=True)
class TrainCaching:
    """How far it is with what is encoded before the first step."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TrainPicture:
    """A picture that was drawn with a checkpoint."""

    prompt: str
    picture: Named
    """A PNG in the trainer's store."""
    lost_detail: float | None = None
    """Which share of its detail it has lost against the same with many steps, since before the
    training; None where nobody looked."""


@dataclass(frozen=True, slots=True)
class TrainSamples:
    """Pictures that show how far a training is."""

    step: int
    pictures: tuple[TrainPicture, ...]


JobEvent = TrainJob | TrainStep | TrainCheckpoint | TrainSamples | TrainCaching
"""What happens to a job: it is in another state, has learnt, is kept, drawn with, prepared."""


@dataclass(frozen=True, slots=True)
class CacheKind:
    """So much of one kind: "captions", "latents", "pictures"…"""

    kind: str
    count: int
    size_bytes: int


def job(message: trainer_pb2.TrainJob) -> TrainJob:
    """A job."""
    failure = status.from_failure(message.failure) if message.HasField("failure") else None
    return TrainJob(
        id=message.id,
        name=message.spec.name,
        state=names.name_of(message.state, names.JOB_STATES),
        waits_for=message.waits_for,
        failure=failure,
        step=message.step,
        step_count=message.spec.training.step_count,
        created=message.create_time.ToDatetime(),
        updated=message.update_time.ToDatetime(),
        checkpoints=tuple(map(checkpoint, message.checkpoints)),
        spec=message.spec,
    )


def forecast(message: trainer_pb2.PlanTrainJobResponse) -> TrainForecast:
    """What is expected of a job."""
    return TrainForecast(
        spec=message.spec,
        needs=_needs(message.forecast) if message.HasField("forecast") else None,
        waits_for=message.waits_for,
        warnings=tuple(message.warnings),
    )


def _needs(expected: training_pb2.TrainingForecast) -> TrainNeeds:
    has_duration = expected.HasField("step_duration")
    return TrainNeeds(
        parameter_count=expected.parameter_count,
        weights_bytes=expected.weights_bytes,
        learnt_bytes=expected.learnt_bytes,
        step_bytes=expected.step_bytes,
        room_bytes=expected.room_bytes if expected.HasField("room_bytes") else None,
        step_seconds=expected.step_duration.ToNanoseconds() / 1e9 if has_duration else None,
    )


def samples(message: trainer_pb2.TrainSamples) -> TrainSamples:
    """Pictures of a checkpoint."""
    pictures = (
        TrainPicture(
            one.prompt,
            Named(one.picture.sha256, one.picture.size_bytes),
            one.lost_detail if one.HasField("lost_detail") else None,
        )
        for one in message.pictures
    )
    return TrainSamples(message.step, tuple(pictures))


def cache_kind(message: trainer_pb2.CacheKind) -> CacheKind:
    """How much there is."""
    return CacheKind(message.kind, message.count, message.size_bytes)


def checkpoint(message: trainer_pb2.TrainCheckpoint) -> TrainCheckpoint:
    """A checkpoint."""
    return TrainCheckpoint(
        step=message.step,
        weights=Named(message.weights.sha256, message.weights.size_bytes),
        state=tuple(Named(one.sha256, one.size_bytes) for one in message.state),
        created=message.create_time.ToDatetime(),
        validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
    )


def step(message: trainer_pb2.TrainStep | training_pb2.StepReport) -> TrainStep:
    """A step, as the trainer or the DiT service tells it."""
    battery = None
    if isinstance(message, training_pb2.StepReport) and message.HasField("battery_percent"):
        battery = message.battery_percent
    return TrainStep(
        battery_percent=battery,
        device_bytes=message.device_bytes if message.HasField("device_bytes") else None,
        step=message.step,
        loss=message.loss,
        gradient_norm=message.gradient_norm,
        learning_rate=message.learning_rate,
        skipped=message.skipped,
        seconds=message.duration.ToNanoseconds() / 1e9,
        waited_seconds=message.waited.ToNanoseconds() / 1e9,
    )


def event(message: trainer_pb2.WatchTrainJobResponse) -> JobEvent | None:
    """What happened; None for what this version cannot read."""
    match message.WhichOneof("event"):
        case "job":
            return job(message.job)
        case "step":
            return step(message.step)
        case "checkpoint":
            return checkpoint(message.checkpoint)
        case "samples":
            return samples(message.samples)
        case "caching":
            return TrainCaching(message.caching.done, message.caching.total)
        case _:
            return None
