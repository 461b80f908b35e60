"""Configurations of mflux's trainer for Z-Image, in the terms of ours."""

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zimage_core.errors import InvalidRequest

_OWN = ("training_loop", "lora_layers", "examples", "full_finetune")
_MODELS = ("z-image", "z-image-base", "z-image-turbo")
_COURSES = {
    "constant": "constant",
    "cosine": "cosine",
    "onecycle": "one-cycle",
    "linear_warmup": "constant",
}
_STACKS = {
    "main_layers": "layers",
    "noise_refiner": "noise_refiner",
    "context_refiner": "context_refiner",
}
_LINEARS = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip
_MODULATION = "adaLN_modulation.0"
_USUAL_RANK = 32
_USUAL_STEPS = 50
_HELD_OUT = 0.1
"""Of the pictures, by which to tell whether it gets better."""


def is_one(values: Mapping[str, Any]) -> bool:
    """Whether a file is such a configuration."""
    return any(key in values for key in _OWN)


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """What it asks for; raises InvalidRequest for what cannot be had, by its path."""
    given = _Table(values, "")
    given.one_of("model", _MODELS, "z-image")
    is_full = given.one_of("mode", ("lora", "full"), "lora") == "full"
    full = given.table("full_finetune")
    _refuse_parts(full)
    given.take("guidance", 0.0)  # of the pictures that it would draw meanwhile
    loop, save = given.table("training_loop"), given.table("save")
    at_once = loop.take("batch_size", 1)
    training = {
        "seed": given.take("seed", 0),
        "samples_at_once": at_once,
        **_learnt(given, is_full=is_full, has_layers="lora_layers" in values),
        "noise": {"distribution": "schedule", "step_count": given.take("steps", _USUAL_STEPS)},
        **_optimizer(given.table("optimizer")),
    }
    if not full.take("gradient_checkpointing", True):
        training["recompute"] = "nothing"  # otherwise as there is room
    average = given.table("ema")
    if average.take("enabled", False):
        training["average_decay"] = average.take("decay", 0.9999)
    found = {
        "epochs": loop.take("num_epochs", 1),
        "batch_size": at_once * loop.take("gradient_accumulation_steps", 1),
        "training": training,
        "data": _data(given),
    }
    width, height = given.take("width", 0), given.take("height", 0)
    if width and height:
        found["sides_px"] = [round(math.sqrt(width * height))]
    if interval := save.take("checkpoint_frequency", 0):
        found["checkpoint_interval_steps"] = interval
    if output := save.take("output_path", ""):
        found["name"] = Path(output).name
    found["kept_checkpoint_count"] = save.take("keep_last_n_checkpoints", 0)
    stopping = given.table("early_stopping")
    patience, gain = stopping.take("patience", 5), stopping.take("min_delta", 0.0)
    if stopping.take("enabled", False):
        found["validation"] = {
            "share": _HELD_OUT, "patience": patience, "least_gain": gain,
        }  # fmt: skip
    for rest in (full, loop, save, average, stopping, given):
        rest.refuse_unknown()
    return found


def _learnt(given: "_Table", *, is_full: bool, has_layers: bool) -> dict[str, Any]:
    if is_full and has_layers:
        raise _refusal("lora_layers", "some", "none with mode full")
    if is_full:
        return {"full": True}
    return {"lora": {"groups": _groups(given.table("lora_layers"), is_given=has_layers)}}


def _refuse_parts(full: "_Table") -> None:
    if not full.take("train_transformer", True):
        raise _refusal("full_finetune.train_transformer", "false", "true: it is what learns")
    for part, instead in (
        ("train_vae", "the VAE stays as it is"),
        ("train_text_encoder", "captions are encoded by an encoder service, which stays as it is"),
    ):
        if full.take(part, False):
            raise _refusal(f"full_finetune.{part}", "true", f"false: {instead}")


def _groups(layers: "_Table", *, is_given: bool) -> list[dict[str, Any]]:
    groups = []
    for theirs, ours in _STACKS.items():
        if is_given and not layers.has(theirs):
            continue
        one = layers.table(theirs)
        blocks = one.table("block_range")
        group = {
            "stack": ours,
            "linears": one.take("layer_types", _usual(ours)),
            "rank": one.take("lora_rank", _USUAL_RANK),
        }
        if end := blocks.take("end", 0):
            group |= {"first_block": blocks.take("start", 0), "end_block": end}
        groups.append(group)
        blocks.refuse_unknown()
        one.refuse_unknown()
    layers.refuse_unknown()
    return groups


def _usual(stack: str) -> list[str]:
    has_modulation = stack != "context_refiner"  # captions do not know the time
    return [*_LINEARS, *([_MODULATION] if has_modulation else [])]


def _optimizer(given: "_Table") -> dict[str, Any]:
    name = given.one_of("name", ("AdamW", "Adam"), "AdamW")
    decay = given.take("weight_decay", 0.01 if name == "AdamW" else 0.0)
    if name == "Adam" and decay:
        raise _refusal("optimizer.weight_decay", decay, "0 with Adam, or AdamW")
    if given.take("warmup_ratio", 0.0):
        raise _refusal("optimizer.warmup_ratio", "a share", "warmup_steps")
    course = _COURSES[given.one_of("scheduler_type", tuple(_COURSES), "constant")]
    given.only("pct_start", 0.3)
    names = ("beta1", "beta1"), ("beta2", "beta2"), ("eps", "epsilon")
    usual = {ours: given.take(theirs, None) for theirs, ours in names}
    rate = {
        "peak": given.take("learning_rate", 1e-4),
        "course": course,
        "warmup_step_count": given.take("warmup_steps", 0),
        "least": given.take("min_lr", 0.0),
    }
    optimizer = {
        "name": "adamw",
        "weight_decay": decay,
        "largest_gradient_norm": given.take("max_grad_norm", 1.0),
        **{name: value for name, value in usual.items() if value is not None},
    }
    given.refuse_unknown()
    return {"optimizer": optimizer, "learning_rate": rate}


def _data(given: "_Table") -> dict[str, Any] | None:
    more = given.table("dataset")
    more.take("use_aspect_ratio_bucketing", True)
    more.only("random_crop", False)
    repeats = more.take("repeat_count", 1)
    flips = more.take("enable_augmentation", False)
    more.refuse_unknown()
    examples = given.table("examples")
    images = examples.take("images", None)
    path = examples.take("path", ".")
    examples.refuse_unknown()
    if images is None:
        return None
    if not isinstance(images, list):
        raise _refusal("examples.images", str(images)[:100], "a list")
    pictures = [_Table(one, f"examples.images[{index}]") for index, one in enumerate(images)]
    named = [
        {"image": one.take("image", ""), "caption": one.take("prompt", "")} for one in pictures
    ]
    for one in pictures:
        one.refuse_unknown()
    return {
        "path": path,
        "repeats": repeats,
        "flips": flips,
        "images": named,
    }


class _Table:
    """Values that are asked for one by one; what nobody asked for is not known."""

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, Mapping):
            raise _refusal(path, str(values)[:100], "an object")
        self._values = values
        self._path = path
        self._asked: list[str] = []

    def has(self, name: str) -> bool:
        """Whether it is given."""
        return name in self._values

    def table(self, name: str) -> "_Table":
        """A table in it; empty where there is none."""
        self._asked.append(name)
        return _Table(self._values.get(name, {}), self._at(name))

    def take(self, name: str, usual: Any) -> Any:
        """A value, of the same kind as the usual one."""
        self._asked.append(name)
        value = self._values.get(name, usual)
        kinds: dict[type, tuple[Callable[[Any], bool], str]] = {
            bool: (lambda one: isinstance(one, bool), "true or false"),
            int: (lambda one: isinstance(one, int) and not isinstance(one, bool), "a whole number"),
            float: (lambda one: isinstance(one, int | float), "a number"),
            str: (lambda one: isinstance(one, str), "a text"),
            list: (lambda one: isinstance(one, list), "a list"),
        }
        fits, allowed = kinds.get(type(usual), (lambda _one: True, ""))
        if not fits(value):
            raise _refusal(self._at(name), str(value)[:100], allowed)
        return value

    def one_of(self, name: str, known: tuple[str, ...], usual: str) -> str:
        """One of the values that there are."""
        value = str(self.take(name, usual))
        if value not in known:
            raise _refusal(self._at(name), value[:100], ", ".join(known))
        return value

    def only(self, name: str, usual: object) -> None:
        """Refuses any other value: it would change what cannot be changed here."""
        if self.take(name, usual) != usual:
            raise _refusal(self._at(name), str(self._values[name])[:100], f"{usual} alone")

    def refuse_unknown(self) -> None:
        """Raises InvalidRequest for what nobody asked for."""
        for name in self._values:
            if name not in self._asked:
                nearest = difflib.get_close_matches(name, self._asked, n=1)
                raise InvalidRequest.given(
                    self._at(name), "it is", ", ".join(self._asked), "FIELD", *nearest
                )

    def _at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


def _refusal(field: str, given: object, allowed: str) -> InvalidRequest:
    return InvalidRequest.given(field, given, allowed, "FIELD")
