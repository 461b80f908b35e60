"""Adapter files: which tensors of a LoRA change which linear of the transformer, and how strongly.

Tools disagree about prefixes, separators, the names of the two halves, whether q, k and v are one,
and where the strength stands. One plan comes of all of them, by the names of diffusers; a file of
which anything would be left out is refused.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_core.errors import InvalidModel, InvalidRequest
from zimage_core.formats import weights
from zimage_core.formats.weights import Weight

SETTINGS = "lora_adapter_metadata"
"""Under which name of a file's metadata diffusers keeps the settings of peft."""

_LONGEST_HEADER = 8 << 20
"""Of strangers' files: parsing it keeps this process from all else. A usual one has 0.2 MB."""
_LONGEST_NAME = 300
_MOST_PATTERNS = 1000
_LARGEST_STRENGTH = 1e4
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "_orig_mod.",
)
_JOINED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_DOWN = re.compile(r"\.(lora_A(\.[^.]+)?|lora_down|lora\.down)\.weight$")
_UP = re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|lora\.up)\.weight$")
_ALPHA = re.compile(r"\.alpha$")
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.b?oft_"),
    "LoCon with a middle part": re.compile(r"\.lora_mid\."),
    "LoRA with biases": re.compile(r"\.lora_(B|up)\b.*\.bias$"),
    "whole differences of weights": re.compile(r"\.diff(_b)?$"),
    "an adapter of the text encoder": re.compile(r"^(text_encoder|lora_te)"),
}
_FUSED = (".attention.qkv", ".attention.to_qkv")
_SPLIT = (".attention.to_q", ".attention.to_k", ".attention.to_v")
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of peft to begin that take something out of the weights: the rest is not what we have."""
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_FLOATS = ("F32", "F16", "BF16")
_NAMED_IN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter adds to the weight of one linear: `strength` times `up` times `down`."""

    linear: str
    down: str
    """The tensor [rank, input], by its name in the file."""
    up: str
    """The tensor [output, rank], likewise."""
    first_row: int
    """Where the linear's rows of `up` begin: not at 0 where q, k and v are one."""
    row_count: int
    rank: int
    strength: float


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """All that a file changes."""

    changes: tuple[Change, ...]
    metadata: Mapping[str, str]
    """What the file says of itself."""

    @property
    def rank(self) -> int:
        """The highest."""
        return max(change.rank for change in self.changes)


def read_plan(path: Path, linears: Mapping[str, tuple[int, int]]) -> AdapterPlan:
    """The plan of a file for a model with these linears, by their outputs and inputs. Raises
    InvalidRequest for what is no LoRA, not for this model, or not understood to its last tensor."""
    try:
        tensors, metadata = weights.read_whole(path, _LONGEST_HEADER)
    except InvalidModel as error:  # where this machine keeps it is not its sender's business
        what = error.message.removeprefix(f"{path}: ")
        raise refusal("ADAPTER_FILE", f"this is no usable safetensors file: {what}") from None
    modules, strengths = _modules(tensors), _Strengths(metadata)
    places = _places(linears)
    if unknown := [name for name in modules if _bare(name) not in places]:
        raise refusal("ADAPTER_KEYS", f"this model has no linear {_few(unknown)}")
    changes: dict[str, Change] = {}
    for name in sorted(modules, key=lambda name: places[_bare(name)].is_original):
        place = places[_bare(name)]
        if place.is_original and all(linear in changes for linear in place.linears):
            continue  # some trainers write the same a second time, by the names of the original
        for change in modules[name].changes(name, place.linears, linears, strengths):
            if change.linear in changes:
                raise refusal("ADAPTER_KEYS", f"it changes {change.linear} twice")
            changes[change.linear] = change
    if not changes:
        raise refusal("ADAPTER_KEYS", "there is no LoRA in it")
    return AdapterPlan(tuple(changes.values()), metadata)


class _Strengths:
    """What peft's settings say, where a file carries them. Alphas among its tensors count more."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._settings: dict[str, Any] = {}
        if SETTINGS in metadata:
            try:
                settings = dict(json.loads(metadata[SETTINGS]))
            except (ValueError, TypeError, RecursionError):
                what = f"its metadata {SETTINGS} is no readable JSON object"
                raise refusal("ADAPTER_FILE", what) from None
            self._settings = {_without_prefix(name): settings[name] for name in settings}
        beginning = str(self._settings.get("init_lora_weights"))
        if beginning.startswith(_CHANGES_THE_BASE):
            what = f"{beginning} of peft changes the weights of the model, too, and is not in it"
            raise refusal("ADAPTER_KIND", what)

    def of(self, linear: str, rank: int, alpha: float | None) -> float:
        """By how much the product of the halves counts."""
        divisor = float(rank)
        if alpha is None:
            alpha = self._alpha(linear, rank)
            if self._settings.get("use_rslora"):
                divisor = math.sqrt(rank)
        if not abs(alpha / divisor) <= _LARGEST_STRENGTH:  # nor is what is no number
            raise refusal("ADAPTER_FILE", f"the alpha of {linear} is {alpha}, its rank {rank}")
        return alpha / divisor

    def _alpha(self, linear: str, rank: int) -> float:
        patterns = self._settings.get("alpha_pattern") or {}
        try:
            if len(patterns) > _MOST_PATTERNS:
                raise ValueError(f"{len(patterns)} patterns, {_MOST_PATTERNS} at most are taken")
            for pattern, alpha in patterns.items():
                if _is_meant(linear, pattern):
                    return float(alpha)
            return float(self._settings.get("lora_alpha", rank))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"its metadata {SETTINGS} has no usable alpha: {error}"
            raise refusal("ADAPTER_FILE", what) from None


def _is_meant(linear: str, pattern: str) -> bool:
    """Whether a pattern of peft means a linear. Peft takes any regular expression, of which one can
    keep us busy for ever: names and ends of names are all that we take."""
    name = pattern.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"the pattern {pattern[:80]!r} is no name")
    return linear == name or (linear.endswith(f".{name}") and not pattern.startswith("^"))


@dataclass(slots=True)
class _Module:
    """What a file holds under one name."""

    down: tuple[str, Weight] | None = None
    up: tuple[str, Weight] | None = None
    alpha: float | None = None

    def take_down(self, name: str, weight: Weight) -> None:
        """The first half."""
        if self.down:
            raise refusal("ADAPTER_KEYS", f"{self.down[0]} and {name}: only one can be used")
        self.down = name, weight

    def take_up(self, name: str, weight: Weight) -> None:
        """The second."""
        if self.up:
            raise refusal("ADAPTER_KEYS", f"{self.up[0]} and {name}: only one can be used")
        self.up = name, weight

    def changes(
        self,
        name: str,
        places: tuple[str, ...],
        linears: Mapping[str, tuple[int, int]],
        strengths: _Strengths,
    ) -> Iterator[Change]:
        """The same as changes of linears; of several, each has its part of the rows."""
        if self.down is None or self.up is None:
            half = (
                "second half (lora_B, lora_up)" if self.down else "first half (lora_A, lora_down)"
            )
            raise refusal("ADAPTER_KEYS", f"{name} lacks a {half}")
        (down, down_weight), (up, up_weight) = self.down, self.up
        rank = down_weight.shape[0] if down_weight.shape else 0
        width = linears[places[0]][1]
        rows = sum(linears[linear][0] for linear in places)
        _check_shape(down, down_weight, (rank, width))
        _check_shape(up, up_weight, (rows, rank))
        first_row = 0
        for linear in places:
            row_count = linears[linear][0]
            strength = strengths.of(linear, rank, self.alpha)
            yield Change(linear, down, up, first_row, row_count, rank, strength)
            first_row += row_count


def _modules(tensors: Mapping[str, Weight]) -> dict[str, _Module]:
    """By the names before the endings, as they stand in the file."""
    modules: dict[str, _Module] = {}
    unknown = []
    for name, weight in tensors.items():
        if len(name) > _LONGEST_NAME:
            raise refusal("ADAPTER_KEYS", f"no part of a LoRA is called {name[:80]}...")
        _refuse_other_kinds(name)
        if ending := _DOWN.search(name):
            module = modules.setdefault(name[: ending.start()], _Module())
            module.take_down(name, weight)
        elif ending := _UP.search(name):
            module = modules.setdefault(name[: ending.start()], _Module())
            module.take_up(name, weight)
        elif ending := _ALPHA.search(name):
            module = modules.setdefault(name[: ending.start()], _Module())
            module.alpha = _scalar(name, weight)
        else:
            unknown.append(name)
    if unknown:
        raise refusal("ADAPTER_KEYS", f"no part of a LoRA is called {_few(unknown)}")
    return modules


@dataclass(frozen=True, slots=True)
class _Place:
    """What a name means: a linear, or the three that are one in the original code."""

    linears: tuple[str, ...]
    is_original: bool = False


def _places(linears: Mapping[str, tuple[int, int]]) -> dict[str, _Place]:
    """By all names that they go by. Some tools join the parts of a name by underscores, some
    separate at those that belong to it."""
    places: dict[str, _Place] = {}
    for linear in linears:
        places[linear] = _Place((linear,))
        for name in _original(linear):
            places[name] = _Place((linear,), is_original=True)
        block, found, _ = linear.partition(_SPLIT[0])
        if found:
            split = tuple(block + part for part in _SPLIT)
            places |= {block + name: _Place(split, is_original=True) for name in _FUSED}
    joined = {name.replace(".", "_"): place for name, place in places.items()}
    return {name.replace("_", "."): place for name, place in places.items()} | joined | places


def _original(linear: str) -> Iterator[str]:
    """A linear's names in the original code."""
    if linear.endswith(".attention.to_out.0"):
        yield linear.removesuffix(".0")
        yield linear.replace(".to_out.0", ".out")
    if linear.startswith("all_"):
        yield re.sub(r"^all_(\w+)\.\d+-1", r"\1", linear)


def _bare(name: str) -> str:
    """Without what tools put before it."""
    name = _without_prefix(name)
    for prefix in _JOINED_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _without_prefix(name: str) -> str:
    while prefix := next((one for one in _PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


def _refuse_other_kinds(name: str) -> None:
    for kind, sign in _OTHER_KINDS.items():
        if sign.search(name):
            what = f"{name} makes it {kind}, and LoRA is what can be used"
            raise refusal("ADAPTER_KIND", what)


def _check_shape(name: str, weight: Weight, wanted: tuple[int, int]) -> None:
    """As a linear or as a convolution of one pixel."""
    if weight.element_type not in _FLOATS:
        allowed = ", ".join(_FLOATS)
        raise refusal("ADAPTER_FILE", f"{name} is {weight.element_type}, allowed are {allowed}")
    if not wanted[0] or weight.shape not in (wanted, (*wanted, 1, 1)):
        what = f"{name} is {list(weight.shape)}, for this model it would be {list(wanted)}"
        raise refusal("ADAPTER_SHAPE", what)


def _scalar(name: str, weight: Weight) -> float:
    if math.prod(weight.shape) == 1:
        if weight.element_type == "BF16":
            return float(struct.unpack("<f", b"\0\0" + bytes(weight.data))[0])
        if form := _SCALARS.get(weight.element_type):
            return float(struct.unpack(form, weight.data)[0])
    what = f"{name} is no number but {weight.element_type} {list(weight.shape)}"
    raise refusal("ADAPTER_FILE", what)


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def refusal(reason: str, what: str) -> InvalidRequest:
    """The error of a file that cannot be used as an adapter."""
    return InvalidRequest(f"the adapter cannot be used: {what}", reason=reason)
