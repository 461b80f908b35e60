"""What a caller may ask of a picture, and the message that says so on the wire.

None means unset everywhere, and unset is not zero: the server then uses the model's default.
"""

import difflib
import secrets
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from zimage_core.digests import is_digest
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import InvalidRequest
from zimage_core.wire import names
from zimage_rpc.dit.v1 import dit_pb2

SEED_LIMIT = 1 << 32
"""Seeds are drawn below this; any 64-bit integer may be given."""

_LONGEST_TIMEOUT_SECONDS = 1e9  # gRPC takes much more, and infinity, for a time that is over


Packing = Literal["shared", "solo"]
"""Whether work is shared with other requests, which moves the last bits."""


class Options(TypedDict, total=False):
    """The options of `generate` and `stream`."""

    negative: str | Prompt | Embedding | None
    """What guidance leads away from; unset is the empty prompt."""
    width: int | None
    height: int | None
    """In pixels, multiples of 16."""
    seed: int | None
    """Of the first picture; picture i has seed + i. Unset: one is drawn here."""
    count: int | None
    """How many pictures."""
    steps: int | None
    guidance: float | None
    """g in v = v+ + g (v+ - v-); 0 is off. The usual scale w is 1 + g."""
    schedule: Literal["official", "legacy"] | None
    sigmas: Sequence[float] | None
    """The noise levels themselves, before the shift, without the final 0."""
    shift: float | None
    force_guidance: bool | None
    """Allows guidance on a Turbo model, which was made to run without."""
    cfg_normalization: float | None
    cfg_truncation: float | None
    format: Literal["png", "jpeg", "webp"] | None
    quality: int | None
    """1 to 100, for JPEG and WebP."""
    metadata: Literal["receipt", "none"] | None
    """What the file says of how it was made; the receipt holds the prompts, too."""
    packing: Packing | None
    """solo: no step is shared with other requests, which moves the last bits."""
    priority: Literal["interactive", "normal", "background"] | None
    """How urgent it is, next to the requests of others."""
    previews: Literal["auto", "latents", "vae"] | None
    """What makes pictures of how it goes on; auto: the latents where their map is good enough.
    Unset: there are none."""
    preview_interval: int | None
    """How many steps lie between two of them; unset: 1."""
    adapters: Mapping[str | Path, float] | None
    """What changes the model for these pictures, with its strength, where 1 is as it was trained:
    names that the service knows, LoRA files of this machine (Path), SHA-256 of files that the
    service has."""
    timeout: float | None
    """Seconds for everything, repeated tries included; unset: none."""
    retry: bool | None
    """False: a request that breaks is not sent again."""


_PLACES = {
    "width": "width_px",
    "height": "height_px",
    "seed": "seed",
    "count": "image_count",
    "steps": "step_count",
    "guidance": "guidance_scale",
    "shift": "schedule.shift",
    "force_guidance": "z_image.force_guidance",
    "cfg_normalization": "z_image.cfg_normalization",
    "cfg_truncation": "z_image.cfg_truncation",
    "quality": "output.quality",
    "preview_interval": "previews.interval_steps",
}
_CHOICES: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "schedule": ("schedule.rule", names.RULES),
    "format": ("output.format", names.FORMATS),
    "metadata": ("output.metadata", names.METADATA),
    "packing": ("packing", names.PACKINGS),
    "priority": ("priority", names.PRIORITIES),
    "previews": ("previews.source", names.PREVIEWS),
}


def check_timeout(seconds: float | None, name: str = "timeout") -> None:
    """Raises InvalidRequest for what is no time to wait, or to look back."""
    if seconds is None:
        return
    if not isinstance(seconds, int | float) or not 0 < seconds <= _LONGEST_TIMEOUT_SECONDS:
        raise _invalid(
            name,
            seconds,
            f"allowed: more than 0 and at most {_LONGEST_TIMEOUT_SECONDS:.0e} seconds, or none",
        )


def _check_names(options: Mapping[str, object]) -> None:
    """Raises TypeError for an option that does not exist, as Python does for an argument."""
    for name in options:
        if name not in Options.__annotations__:
            nearest = difflib.get_close_matches(name, Options.__annotations__, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise TypeError(f"there is no option {name!r}{hint}")


def spec(options: Options) -> dit_pb2.GenerateSpec:
    """The message of the options that go to the server as they are, with a seed for sure.

    The seed is drawn here, so that a request that has to be sent again is the same request.
    Raises for any option that cannot be meant, those that stay here included.
    """
    _check_names(options)
    check_timeout(options.get("timeout"))
    message = dit_pb2.GenerateSpec(seed=secrets.randbelow(SEED_LIMIT))
    for name, value in options.items():
        if value is None:
            continue
        if name in _PLACES:
            _set(message, _PLACES[name], name, value)
        elif name in _CHOICES:
            path, choices = _CHOICES[name]
            _set(message, path, name, choice(name, value, choices))
        elif name == "sigmas":
            try:
                message.schedule.sigmas.extend(value)  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise _invalid(name, value, str(error)) from None
            if not message.schedule.sigmas:
                raise _invalid(name, value, "an empty schedule makes no picture")
        elif name == "adapters":
            _add_adapters(message, value)
    return message


def choice(name: str, value: object, choices: Mapping[str, int]) -> int:
    """The number of a choice on the wire; raises InvalidRequest for none of them."""
    if value not in choices:
        raise _invalid(name, value, f"allowed: {', '.join(choices)}")
    return choices[str(value)]


def adapter_files(options: Options) -> dict[int, Path]:
    """The adapters that are files of this machine, by their places in the spec: their digests are
    still to be entered there."""
    sources = options.get("adapters") or {}
    return {at: source for at, source in enumerate(sources) if isinstance(source, Path)}


def _add_adapters(message: dit_pb2.GenerateSpec, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _invalid("adapters", value, "allowed: a mapping of names or files to strengths")
    for source, scale in value.items():
        use = message.adapters.add()
        if isinstance(source, str) and is_digest(source):
            use.digest.sha256 = source
        elif isinstance(source, str):
            _set(use, "name", "adapters", source)
        elif not isinstance(source, Path):
            raise _invalid("adapters", source, "allowed: a name, a digest, or a Path to a file")
        _set(use, "scale", "adapters", scale)


def options(spec: dit_pb2.GenerateSpec) -> Options:
    """The options of a message in which every setting is decided."""
    found: dict[str, Any] = {name: _get(spec, path) for name, path in _PLACES.items()}
    found |= {
        name: chosen
        for name, (path, choices) in _CHOICES.items()
        if (chosen := names.name_of(_get(spec, path), choices))
    }
    if not spec.output.HasField("quality"):
        del found["quality"]
    if spec.adapters:
        scales: dict[str, float] = {}
        for use in spec.adapters:  # the same file by two names adds up
            scales[use.digest.sha256] = scales.get(use.digest.sha256, 0.0) + use.scale
        found["adapters"] = scales
    if not spec.HasField("previews"):
        del found["previews"], found["preview_interval"]
    if spec.schedule.sigmas:
        del found["steps"]
        found.pop("schedule", None)
        found["sigmas"] = list(spec.schedule.sigmas)
    return cast("Options", found)


def _get(message: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), message)


def _set(message: Any, path: str, name: str, value: object) -> None:
    *parents, field = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise _invalid(name, value, str(error)) from None


def _invalid(name: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name}: {value!r} given; {why}",
        reason="OPTION",
        fields={"field": name, "given": repr(value)},
    )
