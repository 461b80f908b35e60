"""What a job would be, take and last, before it is one."""

from collections.abc import Sequence

from trainer_service.desk import Desk
from zimage_client import AsyncClient, Limits
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import epoch_length, held_out, size_px
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2

_TEMPLATE_TOKENS, _LEAST_BYTES_OF_A_TOKEN = 20, 2
"""How long captions become at most, as good as always."""


async def forecast(
    desk: Desk, dit: AsyncClient, limits: Limits, spec: trainer_pb2.TrainJobSpec
) -> training_pb2.TrainingForecast:
    """What a DiT service expects of a job; what it decides is decided in the spec, too."""
    learnt = await desk.aside(lambda: _learnt(desk, spec))

    async def expected() -> training_pb2.TrainingForecast:
        return await dit.plan_training(
            training_pb2.PlanTrainingRequest(
                plan=spec.training,
                largest_batch=largest_batch(spec, learnt, limits),
                batch_is_open=spec.batch_size == 0,
            )
        )

    if spec.batch_size == 0:  # there may be fewer than there is room for
        found = await expected()
        decide(spec, found.plan, found.batch_size, learnt)
    found = await expected()
    decide(spec, found.plan, found.batch_size, learnt)
    return found


def largest_batch(
    spec: trainer_pb2.TrainJobSpec, learnt: Sequence[Example], limits: Limits
) -> list[training_pb2.SampleSize]:
    """One that takes as much as any may."""
    multiple = limits.side_multiple_px
    sizes = {
        size_px(one.width_px, one.height_px, side, multiple)
        for one in learnt
        for side in spec.sides_px
    }
    image = max(width * height for width, height in sizes) // multiple**2
    said = max(len(one.caption.encode()) for one in learnt)
    caption = min(limits.max_token_count, _TEMPLATE_TOKENS + said // _LEAST_BYTES_OF_A_TOKEN)
    one = training_pb2.SampleSize(image_tokens=image, caption_tokens=caption)
    return [one] * (spec.batch_size or 1)


def decide(
    spec: trainer_pb2.TrainJobSpec,
    plan: training_pb2.TrainingPlan,
    batch_size: int,
    learnt: Sequence[Example],
) -> None:
    """What was left to the DiT service."""
    spec.training.CopyFrom(plan)
    spec.batch_size = spec.batch_size or min(batch_size, epoch_length(learnt))


def _learnt(desk: Desk, spec: trainer_pb2.TrainJobSpec) -> list[Example]:
    with desk.blobs.open(spec.dataset.sha256) as file:
        examples = dataset_file.load(file.read())
    learnt, _ = held_out(examples, spec.training.seed, spec.validation.share)
    return list(learnt)
