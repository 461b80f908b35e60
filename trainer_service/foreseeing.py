"""What a job would be, take and last, before it is one."""

from collections.abc import Sequence

from trainer_service.caches import CAPTION_TOKENS
from trainer_service.desk import Desk, obstacle_to
from zimage_client import AsyncClient, DitDescription, Limits
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import epoch_length, held_out, size_px
from zimage_rpc.dit.v1 import training_pb2
from zimage_rpc.trainer.v1 import trainer_pb2

LARGEST_BATCH = 256
_PATIENCE_SECONDS = 20.0
"""With a device that does something long: a job is begun without its forecast, too."""
_TEMPLATE_TOKENS, _LEAST_BYTES_OF_A_TOKEN = 20, 2
"""How long captions become at most, as good as always."""


async def forecast(
    desk: Desk, client: AsyncClient, dit: DitDescription, spec: trainer_pb2.TrainJobSpec
) -> training_pb2.TrainingForecast:
    """What a DiT service expects of a job; what it decides is decided in the spec, too. Raises
    what the job would wait for."""
    if obstacle := obstacle_to(spec, dit):
        raise obstacle
    assert dit.limits is not None
    limits = dit.limits
    learnt = await desk.aside(lambda: _learnt(desk, spec))

    async def ask() -> training_pb2.TrainingForecast:
        batch = await desk.aside(lambda: largest_batch(spec, learnt, limits))
        request = training_pb2.PlanTrainingRequest(
            plan=spec.training, largest_batch=batch, batch_is_open=spec.batch_size == 0
        )
        answer = await client.plan_training(request, timeout=_PATIENCE_SECONDS)
        decide(spec, answer.plan, answer.batch_size, learnt)
        return answer

    found = await ask()
    return found if found.batch_size == spec.batch_size else await ask()  # there are fewer


def largest_batch(
    spec: trainer_pb2.TrainJobSpec, learnt: Sequence[Example], limits: Limits
) -> list[training_pb2.SampleSize]:
    """One that takes as much as any may."""
    multiple = limits.side_multiple_px
    shapes = {(one.width_px, one.height_px) for one in learnt}
    sizes = {size_px(*shape, side, multiple) for shape in shapes for side in spec.sides_px}
    image = max(width * height for width, height in sizes) // multiple**2
    said = max(len(one.caption.encode()) for one in learnt)
    longest = min(limits.max_token_count, CAPTION_TOKENS)
    caption = min(longest, _TEMPLATE_TOKENS + said // _LEAST_BYTES_OF_A_TOKEN)
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
    spec.batch_size = spec.batch_size or min(batch_size, epoch_length(learnt), LARGEST_BATCH)


def _learnt(desk: Desk, spec: trainer_pb2.TrainJobSpec) -> list[Example]:
    with desk.blobs.open(spec.dataset.sha256) as file:
        examples = dataset_file.load(file.read())
    learnt, _ = held_out(examples, spec.training.seed, spec.validation.share)
    return list(learnt)
