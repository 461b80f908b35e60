"""What a job is asked to be, decided and checked before it is one."""

from trainer_service.feeding import Desk
from zimage_core import digests
from zimage_core.errors import InvalidRequest, NotFound, Unavailable
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_core.store.blobs import check_name
from zimage_rpc.trainer.v1 import trainer_pb2

_LARGEST_BATCH = 256
_USUAL_INTERVAL = 250
_LARGEST_DATASET_BYTES = 1 << 30
_NAMED_IN_ERRORS = 5


async def decided(desk: Desk, asked: trainer_pb2.TrainJobSpec) -> trainer_pb2.TrainJobSpec:
    """With everything that was left out; raises InvalidRequest with the path of what is wrong, and
    NotFound for files that are not here. What only the DiT service can judge it is asked when the
    job begins."""
    spec = trainer_pb2.TrainJobSpec()
    spec.CopyFrom(asked)
    check_name(spec.name, "spec.name")
    spec.batch_size = _count(spec, "batch_size", 1, _LARGEST_BATCH)
    spec.checkpoint_interval_steps = _count(
        spec, "checkpoint_interval_steps", _USUAL_INTERVAL, 1 << 30
    )
    if not 0 <= spec.caption_dropout <= 1:
        given = spec.caption_dropout
        raise InvalidRequest.given("spec.caption_dropout", given, "0 to 1", "TRAINING_PLAN")
    spec.caption_dropout = asked.caption_dropout
    dit = await desk.client.describe()
    if dit.model is None or dit.limits is None:
        raise Unavailable("the model is being loaded", reason="LOADING", retry_after=1.0)
    spec.side_px = spec.side_px if spec.HasField("side_px") else dit.model.default_side_px
    # A picture of four to one is twice as wide as one with equal sides.
    least, most = dit.limits.side_multiple_px, dit.limits.max_side_px // 2
    if not least <= spec.side_px <= most:
        raise InvalidRequest.given("spec.side_px", spec.side_px, f"{least} to {most}", "SIDE")
    if spec.training.step_count < 1:
        given = spec.training.step_count
        raise InvalidRequest.given("spec.training.step_count", given, "1 or more", "TRAINING_PLAN")
    digests.check(spec.dataset.sha256, "spec.dataset.sha256")
    await desk.aside(lambda: _refuse_missing(desk, spec.dataset.sha256))
    return spec


def _count(spec: trainer_pb2.TrainJobSpec, name: str, usual: int, most: int) -> int:
    value = int(getattr(spec, name)) if spec.HasField(name) else usual  # type: ignore[arg-type]
    if not 1 <= value <= most:
        raise InvalidRequest.given(f"spec.{name}", value, f"1 to {most}", "TRAINING_PLAN")
    return value


def _refuse_missing(desk: Desk, dataset: str) -> None:
    """Reads the dataset and looks for its pictures."""
    with desk.blobs.open(dataset) as file:
        examples = dataset_file.load(file.read(_LARGEST_DATASET_BYTES))
    missing = [one for one in _once(examples) if not desk.blobs.find(one.sha256).complete]
    if missing:
        few = ", ".join(one.name for one in missing[:_NAMED_IN_ERRORS])
        more = f" and {len(missing) - _NAMED_IN_ERRORS} more" * (len(missing) > _NAMED_IN_ERRORS)
        raise NotFound(
            f"spec.dataset names pictures that were not sent: {few}{more}",
            reason="BLOB_NOT_FOUND",
            fields={"field": "spec.dataset", "sha256": missing[0].sha256},
        )


def _once(examples: tuple[Example, ...]) -> list[Example]:
    return list({one.sha256: one for one in examples}.values())
