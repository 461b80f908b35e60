"""What a job is asked to be, decided and checked before it is one."""

import math
from collections.abc import Sequence
from operator import attrgetter

from trainer_service.caches import loading
from trainer_service.desk import Desk, base_model
from trainer_service.foreseeing import LARGEST_BATCH
from zimage_client import DitDescription
from zimage_core import digests
from zimage_core.errors import InvalidRequest, NotFound, Unavailable
from zimage_core.formats import dataset_file
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import epoch_length
from zimage_core.store.blobs import check_name
from zimage_rpc.trainer.v1 import trainer_pb2

_MOST_STEPS = 10_000_000
_MOST_ENCODED_FIRST = 1_000_000
"""Samples, where all of them are looked through before the first step."""
_LONGEST_EPOCH = 10_000_000
_MOST_SIDES = 16
_MOST_SAMPLES = 16
_USUAL_INTERVAL = 250
_USUAL_STATES = 2
_LARGEST_SHARE = 0.5
_MANY_STEPS = 30
"""With which nothing of a distillation is seen."""
_MOST_DRAWN, _DRAWN = 200, "0 to 200; 0 in full training, which has no picture of before"
_LARGEST_DATASET_BYTES = 1 << 30
_NAMED_IN_ERRORS = 5


async def decided(
    desk: Desk,
    dit: DitDescription,
    asked: trainer_pb2.TrainJobSpec,
    *,
    are_pictures_here: bool = True,
) -> trainer_pb2.TrainJobSpec:
    """With everything that was left out; raises InvalidRequest with the path of what is wrong, and
    NotFound for files that are not here. What only the DiT service can judge it is asked when the
    job begins."""
    spec = trainer_pb2.TrainJobSpec()
    spec.CopyFrom(asked)
    check_name(spec.name, "spec.name")
    is_open = spec.HasField("batch_size") and spec.batch_size == 0
    if not is_open:
        spec.batch_size = _count(spec, "batch_size", 1, LARGEST_BATCH)
    spec.checkpoint_interval_steps = _count(
        spec, "checkpoint_interval_steps", _USUAL_INTERVAL, 1 << 30
    )
    spec.kept_state_count = _count(spec, "kept_state_count", _USUAL_STATES, 1 << 30)
    spec.caption_dropout = asked.caption_dropout  # set from here on
    if spec.samples.prompts and not spec.samples.HasField("many_step_count"):
        can_drift = is_turbo(dit) and not spec.training.full
        spec.samples.many_step_count = _MANY_STEPS if can_drift else 0
    spec.captions = spec.captions or trainer_pb2.TrainJobSpec.CAPTIONS_STREAM
    is_encoded_first = spec.only_caches or spec.captions == spec.CAPTIONS_ALL_FIRST
    if is_open and (is_encoded_first or spec.training.HasField("samples_at_once")):
        allowed = "1 to 256 with everything encoded first, or with training.samples_at_once"
        raise InvalidRequest.given("spec.batch_size", "0", allowed, "TRAINING_PLAN")
    most_steps = _MOST_ENCODED_FIRST // spec.batch_size if is_encoded_first else _MOST_STEPS
    for name, is_allowed, allowed in (
        ("caption_dropout", 0 <= spec.caption_dropout <= 1, "0 to 1"),
        ("fixed_tag_count", spec.fixed_tag_count >= 0, "0 or more"),
        ("samples.prompts", len(spec.samples.prompts) <= _MOST_SAMPLES, f"{_MOST_SAMPLES} at most"),
        ("validation.share", _is_share_right(spec), "above 0, 0.5 at most"),
        ("validation.patience", spec.validation.patience >= 0, "0 or more"),
        ("validation.least_gain", 0 <= spec.validation.least_gain < math.inf, "0 or more"),
        ("kept_checkpoint_count", _is_enough_kept(spec), "0, or more than validation.patience"),
        ("least_battery_percent", 0 <= spec.least_battery_percent <= 100, "0 to 100"),
        ("samples.many_step_count", _can_be_drawn(spec), _DRAWN),
        ("training.step_count", 1 <= spec.training.step_count <= most_steps, f"1 to {most_steps}"),
    ):
        if not is_allowed:
            given = attrgetter(name)(spec)
            raise InvalidRequest.given(f"spec.{name}", given, allowed, "TRAINING_PLAN")
    spec.sides_px[:] = _sides(dit, spec)
    spec.base_model = spec.base_model or base_model(dit)
    if not spec.replaces_adapter and not spec.only_caches and not spec.training.full:
        await _refuse_taken(desk, spec.name)
    digests.check(spec.dataset.sha256, "spec.dataset.sha256")
    examples = await desk.aside(lambda: _examples(desk, spec))
    if are_pictures_here:
        await desk.aside(lambda: _refuse_missing(desk, examples))
    if spec.HasField("start"):
        await desk.aside(lambda: _check_start(desk, spec))
    if spec.training.HasField("beside"):
        beside = spec.training.beside.digest
        digests.check(beside.sha256, "spec.training.beside.digest.sha256")
        file = await desk.aside(lambda: desk.blobs.local(beside.sha256))
        beside.size_bytes = file.stat().st_size
    return spec


def _is_share_right(spec: trainer_pb2.TrainJobSpec) -> bool:
    return not spec.HasField("validation") or 0 < spec.validation.share <= _LARGEST_SHARE


def _is_enough_kept(spec: trainer_pb2.TrainJobSpec) -> bool:
    kept = spec.kept_checkpoint_count
    return kept == 0 or kept > spec.validation.patience


def _can_be_drawn(spec: trainer_pb2.TrainJobSpec) -> bool:
    return 0 <= spec.samples.many_step_count <= (0 if spec.training.full else _MOST_DRAWN)


def _check_start(desk: Desk, spec: trainer_pb2.TrainJobSpec) -> None:
    if not 0 <= spec.start.step < spec.training.step_count:
        allowed = f"less than the {spec.training.step_count} of the plan"
        raise InvalidRequest.given("spec.start.step", spec.start.step, allowed, "TRAINING_PLAN")
    if not spec.start.state:
        allowed = "what training goes on from"
        raise InvalidRequest.given("spec.start.state", "none", allowed, "TRAINING_PLAN")
    for index, part in enumerate(spec.start.state):
        digests.check(part.sha256, f"spec.start.state[{index}].sha256")
        desk.blobs.local(part.sha256)


async def _refuse_taken(desk: Desk, name: str) -> None:
    """Nobody's adapter goes unless that is wanted, nor that of a job that is about to learn it."""
    if await desk.aside(lambda: _is_to_be(desk, name)):
        allowed = "a name that no job under way gives, or replaces_adapter"
        raise InvalidRequest.given("spec.name", name, allowed, "ADAPTER_EXISTS")
    for client in desk.dits:
        try:
            await client.get_adapter(name)
        except (NotFound, Unavailable):
            continue
        allowed = "a name that no adapter has, or replaces_adapter"
        raise InvalidRequest.given("spec.name", name, allowed, "ADAPTER_EXISTS")


def _is_to_be(desk: Desk, name: str) -> bool:
    jobs = map(desk.jobs.read, desk.jobs.unfinished())
    return any(trainer_pb2.TrainJobSpec.FromString(job.spec).name == name for job in jobs)


def is_turbo(dit: DitDescription) -> bool:
    """Whether its model was distilled to few steps."""
    return dit.model is not None and dit.model.variant == "turbo"


def warnings(dit: DitDescription, spec: trainer_pb2.TrainJobSpec) -> list[str]:
    """What may not be as it was meant."""
    if not is_turbo(dit) or spec.only_caches or spec.training.HasField("beside"):
        return []
    return [
        "this is a Turbo model: what is learnt on it as it is makes pictures of few steps blurry; "
        "--training-adapter FILE names a LoRA that undoes the distillation while training"
    ]


def _sides(dit: DitDescription, spec: trainer_pb2.TrainJobSpec) -> list[int]:
    if dit.model is None or dit.limits is None:
        raise loading("the model")
    sides = list(dict.fromkeys(spec.sides_px)) or [dit.model.default_side_px]
    if len(sides) > _MOST_SIDES:
        raise InvalidRequest.given(
            "spec.sides_px", f"{len(sides)} sides", f"{_MOST_SIDES} at most", "SIDE"
        )
    # A picture of four to one is twice as wide as one with equal sides.
    least, most = dit.limits.side_multiple_px, dit.limits.max_side_px // 2
    for index, side in enumerate(sides):
        if not least <= side <= most:
            field = f"spec.sides_px[{index}]"
            raise InvalidRequest.given(field, side, f"{least} to {most}", "SIDE")
    return sides


def _count(spec: trainer_pb2.TrainJobSpec, name: str, usual: int, most: int) -> int:
    value = int(getattr(spec, name)) if spec.HasField(name) else usual  # type: ignore[arg-type]
    if not 1 <= value <= most:
        raise InvalidRequest.given(f"spec.{name}", value, f"1 to {most}", "TRAINING_PLAN")
    return value


def _examples(desk: Desk, spec: trainer_pb2.TrainJobSpec) -> tuple[Example, ...]:
    """Of the dataset, which is one."""
    dataset = spec.dataset.sha256
    size = desk.blobs.find(dataset).stored_bytes
    if size > _LARGEST_DATASET_BYTES:
        given, allowed = f"{size} bytes", f"{_LARGEST_DATASET_BYTES} at most"
        raise InvalidRequest.given("spec.dataset", given, allowed, "DATASET")
    with desk.blobs.open(dataset) as file:
        examples = dataset_file.load(file.read())
    if (length := epoch_length(examples)) > _LONGEST_EPOCH:
        given, allowed = f"an epoch of {length}", f"{_LONGEST_EPOCH} at most"
        raise InvalidRequest.given("spec.dataset", given, allowed, "DATASET")
    if spec.HasField("validation") and len({one.sha256 for one in examples}) == 1:
        given, allowed = "one picture, with validation", "two pictures or more"
        raise InvalidRequest.given("spec.dataset", given, allowed, "DATASET")
    return examples


def _refuse_missing(desk: Desk, examples: Sequence[Example]) -> None:
    """Of the pictures."""
    names = {sha256: one.name for one in examples for sha256 in one.files}
    missing = [sha256 for sha256 in names if not desk.blobs.find(sha256).complete]
    if missing:
        few = ", ".join(names[sha256] for sha256 in missing[:_NAMED_IN_ERRORS])
        more = f" and {len(missing) - _NAMED_IN_ERRORS} more" * (len(missing) > _NAMED_IN_ERRORS)
        raise NotFound(
            f"spec.dataset names pictures that were not sent: {few}{more}",
            reason="BLOB_NOT_FOUND",
            fields={"field": "spec.dataset", "sha256": missing[0]},
        )
