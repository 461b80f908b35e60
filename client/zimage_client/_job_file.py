"""A job's file: what shall be learnt, by the names that the wire has for it, and where the pictures
lie."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from zimage_client._dataset import Source
from zimage_core.errors import InvalidRequest
from zimage_core.formats import dataset_file, mflux_config
from zimage_core.formats.dataset_file import Example
from zimage_core.planning.curriculum import epoch_length, held_out
from zimage_core.wire import plain
from zimage_rpc.trainer.v1 import trainer_pb2

USUAL_STEPS = 1500
_MOST_STEPS = 2**31 - 1

_DATA, _EPOCHS, _BESIDE = "data", "epochs", "training_adapter"
"""What a file says beside the fields of the spec."""
_BATCH_SIZE, _AUTO = "batch_size", "auto"
"""What is 0 on the wire."""
_EACH = "[]"


@dataclass(frozen=True, slots=True)
class JobFile:
    """What it says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Of the spec, by the names of its fields."""
    data: "Data | None" = None
    epochs: int | None = None
    """In the place of a count of steps."""
    beside: Path | None = None
    """The file of an adapter that is active while training."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Folder(_Table):
    """Pictures of a folder."""

    path: Path
    caption: str | None = None
    masks: Path | None = None
    repeats: Annotated[int, Field(ge=1, le=dataset_file.MOST_REPEATS)] = 1
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    flips: bool = False
    is_regularisation: Annotated[
        bool, Field(validation_alias=AliasChoices("regularisation", "regularization"))
    ] = False
    """What the model knows and shall not forget: without the trigger word."""


class Picture(_Table):
    """One picture."""

    image: str
    caption: str


class Data(_Table):
    """What is learnt from."""

    folders: tuple[Folder, ...] = ()
    images: tuple[Picture, ...] = ()
    path: Path = Path()
    """The folder of the images."""
    repeats: Annotated[int, Field(ge=1, le=dataset_file.MOST_REPEATS)] = 1
    flips: bool = False
    trigger: str = ""
    skip_faulty: bool = False

    def sources(self) -> list[Source]:
        """Where pictures come from."""
        found = [
            Source(
                folder=one.path,
                caption=one.caption,
                masks=one.masks,
                trigger="" if one.is_regularisation else self.trigger,
                repeats=one.repeats,
                weight=one.weight,
                flips=one.flips,
            )
            for one in self.folders
        ]
        if self.images:
            named = tuple((one.image, one.caption) for one in self.images)
            found.append(
                Source(
                    self.path,
                    named,
                    trigger=self.trigger,
                    repeats=self.repeats,
                    flips=self.flips,
                )
            )
        return found


def read(path: Path) -> JobFile:
    """What a file says, TOML or JSON; raises InvalidRequest naming what is wrong. Folders are
    relative to the file."""
    values = _values(path)
    if mflux_config.is_one(values):
        values = mflux_config.translated(values)
    data, epochs = values.pop(_DATA, None), values.pop(_EPOCHS, None)
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise InvalidRequest.given(_EPOCHS, epochs, "a whole number, 1 or more", "FIELD")
    if "dataset" in values:
        raise InvalidRequest.given("dataset", "a digest", "pictures under data", "FIELD")
    beside = values.pop(_BESIDE, None)
    if beside is not None and not isinstance(beside, str):
        raise InvalidRequest.given(_BESIDE, str(beside)[:100], "the path of a file", "FIELD")
    return JobFile(
        values,
        None if data is None else _data(data, path.parent),
        epochs,
        path.parent / Path(beside).expanduser() if beside else None,
    )


def without_steps(job: JobFile) -> JobFile:
    """The same for whoever says how many epochs."""
    plan = job.values.get("training", {})
    if not isinstance(plan, Mapping):
        return job
    left = {name: value for name, value in plan.items() if name != "step_count"}
    return replace(job, values={**job.values, "training": left})


def spec(
    job: JobFile, overriding: Mapping[str, object], examples: Sequence[Example]
) -> trainer_pb2.TrainJobSpec:
    """The message that a file and what is said beside it ask for; paths have dots."""
    values = job.values
    for path, value in overriding.items():
        if value is not None:
            values = _with(values, path.split("."), value)
    made = trainer_pb2.TrainJobSpec()
    is_open = values.get(_BATCH_SIZE) == _AUTO
    if values.get(_BATCH_SIZE) == 0:
        raise InvalidRequest.given(_BATCH_SIZE, 0, f"1 or more, or {_AUTO}", "FIELD")
    plain.fill(made, {**values, _BATCH_SIZE: 0} if is_open else values)
    is_given = "step_count" in values.get("training", {})
    if job.epochs is not None:
        if is_given:
            allowed = "either of both"
            raise InvalidRequest.given(_EPOCHS, "beside training.step_count", allowed, "FIELD")
        batch_size = made.batch_size if made.HasField("batch_size") else 1
        if batch_size < 1:
            given, allowed = values["batch_size"], "1 or more with epochs"
            raise InvalidRequest.given("batch_size", given, allowed, "FIELD")
        learnt, _ = held_out(examples, made.training.seed, made.validation.share)
        made.training.step_count = min(
            math.ceil(epoch_length(learnt) * job.epochs / batch_size), _MOST_STEPS
        )
    elif not is_given:
        made.training.step_count = USUAL_STEPS
    return made


def _values(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise _refusal(path, error.strerror or "cannot be read") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _refusal(path, str(error)) from None
    if not isinstance(values, dict):
        raise _refusal(path, "no object")
    return values


def _data(values: Any, beside: Path) -> Data:
    try:
        data = Data.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([_DATA, *map(str, first["loc"])])
        raise InvalidRequest.given(
            where, str(first["input"])[:100], first["msg"].lower(), "FIELD"
        ) from None

    def there(path: Path) -> Path:
        return beside / path.expanduser()

    folders = tuple(
        one.model_copy(update={"path": there(one.path), "masks": one.masks and there(one.masks)})
        for one in data.folders
    )
    return data.model_copy(update={"folders": folders, "path": there(data.path)})


def _with(values: Mapping[str, Any], path: list[str], value: object) -> dict[str, Any]:
    """The same with another value at a path, of which a part with [] is each table of a list."""
    if not isinstance(values, Mapping):
        raise InvalidRequest.given(".".join(path), str(values)[:100], "a table", "FIELD")
    first, *rest = path
    if not rest:
        return {**values, first: value}
    if first.endswith(_EACH):
        name = first.removesuffix(_EACH)
        return {**values, name: [_with(one, rest, value) for one in values.get(name) or [{}]]}
    return {**values, first: _with(values.get(first, {}), rest, value)}


def _refusal(path: Path, what: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {what}", reason="FILE", fields={"given": str(path)})
