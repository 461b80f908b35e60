"""What a request really asks for: every setting decided, what cannot be refused with what can."""

import math
import secrets
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dit_service import messages
from zimage_core.errors import InvalidRequest
from zimage_core.pictures import files
from zimage_core.planning import previews, schedule, sizes, variants
from zimage_core.settings import DitSettings
from zimage_core.wire import names
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_LARGEST_SEED = 2**63 - 1
_SMALLEST_SHIFT = 1e-3
_LARGEST_REAL = 1e4
"""Far beyond anything useful for guidance, its bounds and the shift, and safe in float32."""
_LARGEST_SCALE = 100.0
"""The same of adapters."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request without anything left open."""

    spec: dit_pb2.GenerateSpec
    """The request as it will be run, as Accepted tells it; asked again, it is the same request."""
    seeds: tuple[int, ...]
    sigmas: tuple[float, ...]
    """After the shift, the final 0 included."""
    file_format: str

    @property
    def is_guided(self) -> bool:
        """Whether there is a negative conditioning."""
        return self.spec.guidance_scale > 0

    @property
    def forward_count(self) -> int:
        """How many forwards all pictures take together."""
        truncation = self.spec.z_image.cfg_truncation
        one = schedule.forward_count(self.sigmas, self.spec.guidance_scale, truncation)
        return one * len(self.seeds)


class Resolver:
    """Knows the model's defaults and the service's limits."""

    def __init__(self, model: messages.Model, settings: DitSettings) -> None:
        self.variant = variants.VARIANTS[model.variant]
        multiple = model.side_multiple_px
        self.limits = dit_pb2.Limits(
            side_multiple_px=multiple,
            max_side_px=min(settings.max_side_px, model.max_side_px) // multiple * multiple,
            max_token_count=model.max_token_count,
            max_image_count=settings.max_image_count,
            max_step_count=settings.max_step_count,
            max_queue_length=settings.max_queue_length,
        )
        self.default_side_px = min(model.default_side_px, self.limits.max_side_px)
        self._shift = model.shift
        self._maps_latents = previews.is_good(model.preview_r_squared)
        self._preview_r_squared = model.preview_r_squared

    def resolve(self, asked: dit_pb2.GenerateSpec) -> Resolved:
        """Fills in what is open; raises InvalidRequest for what cannot be."""
        spec = dit_pb2.GenerateSpec()
        spec.CopyFrom(asked)
        self._decide_size(spec)
        seeds = self._decide_seeds(spec)
        sigmas = self._decide_schedule(spec)
        self._decide_guidance(spec)
        spec.packing = spec.packing or types_pb2.PACKING_SHARED
        spec.priority = spec.priority or types_pb2.PRIORITY_NORMAL
        if spec.HasField("previews"):
            self._decide_previews(spec.previews)
        for index, use in enumerate(spec.adapters):
            field = f"spec.adapters[{index}].scale"
            use.scale = _real(use, field, 1.0, lowest=-_LARGEST_SCALE, highest=_LARGEST_SCALE)
        spec.output.metadata = spec.output.metadata or dit_pb2.Output.METADATA_RECEIPT
        file_format = decide_format(spec.output, "spec.output.")
        return Resolved(spec, seeds, sigmas, file_format)

    def _decide_size(self, spec: dit_pb2.GenerateSpec) -> None:
        for name in ("width_px", "height_px"):
            side = _given(spec, name, self.default_side_px)
            check_side(f"spec.{name}", side, self.limits)
            setattr(spec, name, side)

    def _decide_seeds(self, spec: dit_pb2.GenerateSpec) -> tuple[int, ...]:
        spec.image_count = _whole(spec, "image_count", 1, self.limits.max_image_count)
        spec.seed = _given(spec, "seed", secrets.randbelow(2**32))
        if spec.seed + spec.image_count - 1 > _LARGEST_SEED:
            allowed = f"at most {_LARGEST_SEED - spec.image_count + 1} for that many pictures"
            raise InvalidRequest.given("spec.seed", spec.seed, allowed, "SEED")
        return tuple(range(spec.seed, spec.seed + spec.image_count))

    def _decide_schedule(self, spec: dit_pb2.GenerateSpec) -> tuple[float, ...]:
        asked = spec.schedule
        asked.shift = _real(asked, "spec.schedule.shift", self._shift, lowest=_SMALLEST_SHIFT)
        if asked.sigmas:
            return self._decide_own_sigmas(spec)
        asked.rule = asked.rule or dit_pb2.Schedule.RULE_OFFICIAL
        rule = names.name_of(asked.rule, names.RULES)
        is_legacy = rule == schedule.LEGACY
        default = self.variant.step_count + is_legacy
        spec.step_count = _whole(
            spec, "step_count", default, self.limits.max_step_count, lowest=1 + is_legacy
        )
        return schedule.sigmas(rule, spec.step_count, asked.shift)

    def _decide_own_sigmas(self, spec: dit_pb2.GenerateSpec) -> tuple[float, ...]:
        sigmas, field = list(spec.schedule.sigmas), "spec.schedule.sigmas"
        if len(sigmas) > self.limits.max_step_count:
            allowed = f"at most {self.limits.max_step_count} steps"
            raise InvalidRequest.given(field, f"{len(sigmas)} steps", allowed, "SIGMAS")
        falling = all(above > below for above, below in pairwise([*sigmas, 0.0]))
        if not falling or sigmas[0] > 1:  # NaN is not falling
            raise InvalidRequest.given(field, sigmas, "falling numbers in (0, 1]", "SIGMAS")
        if spec.schedule.rule:
            raise InvalidRequest.given(
                "spec.schedule.rule", spec.schedule.rule, f"none with {field}", "SIGMAS"
            )
        if _given(spec, "step_count", len(sigmas)) != len(sigmas):
            allowed = f"none, or the length of {field}, {len(sigmas)}"
            raise InvalidRequest.given("spec.step_count", spec.step_count, allowed, "SIGMAS")
        spec.step_count = len(sigmas)
        return schedule.shifted(sigmas, spec.schedule.shift)

    def _decide_guidance(self, spec: dit_pb2.GenerateSpec) -> None:
        options = spec.z_image
        spec.guidance_scale = _real(spec, "spec.guidance_scale", self.variant.guidance)
        options.cfg_normalization = _real(options, "spec.z_image.cfg_normalization", 0.0)
        options.cfg_truncation = _real(options, "spec.z_image.cfg_truncation", 1.0)
        if spec.guidance_scale > 0 and self.variant.is_distilled and not options.force_guidance:
            raise InvalidRequest.given(
                "spec.guidance_scale",
                spec.guidance_scale,
                f"0: a {self.variant.name} model has its guidance trained in; to try all the same, "
                "set force_guidance",
                "TURBO_GUIDANCE",
            )
        if spec.guidance_scale == 0:
            spec.ClearField("negative")

    def _decide_previews(self, wanted: dit_pb2.Previews) -> None:
        sources = dit_pb2.Previews
        usual = sources.SOURCE_LATENTS if self._maps_latents else sources.SOURCE_VAE
        if wanted.source == sources.SOURCE_LATENTS and not self._maps_latents:
            raise InvalidRequest.given(
                "spec.previews.source",
                "latents",
                f"vae: a linear map of this model's latents tells {self._preview_r_squared:.2f} of "
                f"a picture's variance, {previews.LEAST_R_SQUARED} are needed",
                "PREVIEW_UNAVAILABLE",
            )
        wanted.source = wanted.source or usual
        longest = self.limits.max_step_count
        wanted.interval_steps = _whole(wanted, "interval_steps", 1, longest, path="spec.previews")


def check_side(field: str, side: int, limits: dit_pb2.Limits) -> None:
    """Raises InvalidRequest for a side that no picture can have, naming the nearest."""
    multiple, longest = limits.side_multiple_px, limits.max_side_px
    if side % multiple or not multiple <= side <= longest:
        allowed = f"a multiple of {multiple} from {multiple} to {longest}"
        nearest = " or ".join(map(str, sizes.nearest_sides(side, multiple, longest)))
        raise InvalidRequest.given(field, side, allowed, "SIZE", nearest)


def decide_format(output: dit_pb2.Output, path: str) -> str:
    """The name of the file format, with its quality decided."""
    output.format = output.format or dit_pb2.Output.FORMAT_PNG
    name = names.name_of(output.format, names.FORMATS)
    if name == "png":
        if output.HasField("quality"):
            allowed = "none: PNG loses nothing"
            raise InvalidRequest.given(f"{path}quality", output.quality, allowed, "QUALITY")
        return name
    output.quality = _given(output, "quality", files.DEFAULT_QUALITY)
    if not 1 <= output.quality <= 100:
        raise InvalidRequest.given(f"{path}quality", output.quality, "1 to 100", "QUALITY")
    return name


def _given(message: Any, name: str, default: int) -> int:
    """The value of an optional field; zero is a value."""
    value: int = getattr(message, name) if message.HasField(name) else default
    return value


def _whole(
    message: Any, name: str, default: int, highest: int, *, lowest: int = 1, path: str = "spec"
) -> int:
    value = _given(message, name, default)
    if not lowest <= value <= highest:
        raise InvalidRequest.given(f"{path}.{name}", value, f"{lowest} to {highest}", name.upper())
    return value


def _real(
    message: Any,
    path: str,
    default: float,
    lowest: float = 0.0,
    highest: float = _LARGEST_REAL,
) -> float:
    name = path.rpartition(".")[2]
    value: float = getattr(message, name) if message.HasField(name) else default
    if not (math.isfinite(value) and lowest <= value <= highest):
        raise InvalidRequest.given(path, value, f"{lowest:g} to {highest:g}", name.upper())
    return value
