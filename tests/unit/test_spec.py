"""What a request becomes, and what it is refused for."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_service import messages
from dit_service.rpc.spec import Resolver
from tests.device.full_size import CONFIG
from zimage_core.errors import InvalidRequest
from zimage_core.settings import DitSettings
from zimage_rpc.dit.v1 import dit_pb2

SETTINGS = DitSettings(model=Path("m"), max_image_count=8, max_step_count=100, max_side_px=4096)
TURBO = messages.Model(
    name="m",
    variant="turbo",
    shift=3.0,
    shape=CONFIG,
    caption_width=2560,
    max_token_count=1504,
    side_multiple_px=16,
    max_side_px=8192,
    default_side_px=1024,
    encoder_identities={},
    device="cpu",
    compute_type="float32",
    vae_compute_type="float32",
    attention_backend="sdpa",
    attention_reasons={"sdpa": "there is nothing else"},
    is_compiled=False,
    compilation_reason="it was asked for so",
    vae_tile_px=0,
    fused_adapter="",
    fused_adapter_scale=0.0,
    weights="full",
    weights_reason="as the file has them",
    streamed_block_count=0,
    preview_r_squared=0.9,
    vae_sha256="",
    is_learnt=False,
    latent_channels=16,
    pixels_per_latent=8,
    thread_count=2,
    library_versions={},
)
BASE = messages.Model(
    **{name: getattr(TURBO, name) for name in TURBO.__slots__ if name not in ("variant", "shift")},
    variant="base",
    shift=6.0,
)


def _resolve(model: messages.Model = TURBO, **fields: Any) -> Any:
    return Resolver(model, SETTINGS).resolve(dit_pb2.GenerateSpec(**fields))


def test_defaults_follow_the_variant() -> None:
    turbo, base = _resolve().spec, _resolve(BASE).spec
    assert (turbo.step_count, turbo.guidance_scale, turbo.schedule.shift) == (8, 0.0, 3.0)
    assert (base.step_count, base.guidance_scale, base.schedule.shift) == (50, 2.5, 6.0)
    assert (turbo.width_px, turbo.height_px, turbo.image_count) == (1024, 1024, 1)
    assert turbo.output.format == dit_pb2.Output.FORMAT_PNG


def test_zero_is_a_wish() -> None:
    resolved = _resolve(BASE, guidance_scale=0.0, seed=0)
    assert resolved.spec.guidance_scale == 0
    assert resolved.seeds == (0,)
    assert not resolved.is_guided


def test_seeds_count_up() -> None:
    assert _resolve(seed=5, image_count=3).seeds == (5, 6, 7)


def test_legacy_default_is_nine_steps_and_eight_forwards() -> None:
    resolved = _resolve(schedule=dit_pb2.Schedule(rule=dit_pb2.Schedule.RULE_LEGACY))
    assert resolved.spec.step_count == 9
    assert resolved.forward_count == 8


def test_the_default_size_fits_any_limit() -> None:
    narrow = DitSettings(model=Path("m"), max_side_px=1000)
    assert Resolver(TURBO, narrow).resolve(dit_pb2.GenerateSpec()).spec.width_px == 992


def test_own_sigmas_are_the_steps() -> None:
    resolved = _resolve(schedule=dit_pb2.Schedule(sigmas=[1.0, 0.5], shift=1.0))
    assert resolved.sigmas == (1.0, 0.5, 0.0)
    assert resolved.spec.step_count == 2


def test_turbo_takes_guidance_by_force() -> None:
    resolved = _resolve(guidance_scale=1.0, z_image=dit_pb2.ZImageOptions(force_guidance=True))
    assert resolved.forward_count == 16


def test_a_resolved_request_is_the_same_request_again() -> None:
    for fields in (
        {"seed": 3},
        {"schedule": dit_pb2.Schedule(sigmas=[0.9, 0.2])},
        {"schedule": dit_pb2.Schedule(rule=dit_pb2.Schedule.RULE_LEGACY), "step_count": 5},
        {"output": dit_pb2.Output(format=dit_pb2.Output.FORMAT_WEBP)},
    ):
        once = _resolve(BASE, **fields)
        again = Resolver(BASE, SETTINGS).resolve(once.spec)
        assert again == once


Sigmas = dit_pb2.Schedule


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"width_px": 1000}, "spec.width_px", "nearest 992 or 1008"),
        ({"height_px": 0}, "spec.height_px", "nearest 16"),
        ({"height_px": 8192}, "spec.height_px", "nearest 4096"),
        ({"image_count": 0}, "spec.image_count", "1 to 8"),
        ({"image_count": 9}, "spec.image_count", "1 to 8"),
        ({"step_count": 0}, "spec.step_count", "1 to 100"),
        ({"step_count": 101}, "spec.step_count", "1 to 100"),
        ({"seed": 2**63 - 1, "image_count": 2}, "spec.seed", "at most"),
        ({"guidance_scale": 1.0}, "spec.guidance_scale", "force_guidance"),
        ({"guidance_scale": -1.0}, "spec.guidance_scale", "0 to"),
        ({"guidance_scale": float("nan")}, "spec.guidance_scale", "0 to"),
        ({"schedule": Sigmas(shift=0.0)}, "spec.schedule.shift", "0.001 to"),
        ({"schedule": Sigmas(shift=float("inf"))}, "spec.schedule.shift", "0.001 to"),
        ({"schedule": Sigmas(sigmas=[0.5, 0.9])}, "spec.schedule.sigmas", "falling"),
        ({"schedule": Sigmas(sigmas=[1.5, 0.9])}, "spec.schedule.sigmas", "falling"),
        ({"schedule": Sigmas(sigmas=[1.0, 0.0])}, "spec.schedule.sigmas", "falling"),
        ({"schedule": Sigmas(sigmas=[float("nan")])}, "spec.schedule.sigmas", "falling"),
        ({"schedule": Sigmas(sigmas=[1.0], rule=1)}, "spec.schedule.rule", "none with"),
        ({"schedule": Sigmas(sigmas=[1.0]), "step_count": 8}, "spec.step_count", "length"),
        ({"schedule": Sigmas(rule=2), "step_count": 1}, "spec.step_count", "2 to 100"),
        ({"output": dit_pb2.Output(quality=9)}, "spec.output.quality", "PNG"),
        ({"output": dit_pb2.Output(format=2, quality=0)}, "spec.output.quality", "1 to 100"),
    ],
)
def test_refusals_name_field_and_remedy(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        _resolve(**fields)
    assert refusal.value.field == field
    assert says in refusal.value.message


@given(
    width=st.integers(-(2**31), 2**31 - 1),
    steps=st.integers(-(2**31), 2**31 - 1),
    count=st.integers(-(2**31), 2**31 - 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    real=st.floats(allow_nan=True, allow_infinity=True),
    sigmas=st.lists(st.floats(), max_size=4),
)
def test_anything_is_resolved_or_refused(
    width: int, steps: int, count: int, seed: int, real: float, sigmas: list[float]
) -> None:
    spec = dit_pb2.GenerateSpec(
        width_px=width, step_count=steps, image_count=count, seed=seed, guidance_scale=real
    )
    spec.schedule.sigmas.extend(sigmas)
    try:
        resolved = Resolver(BASE, SETTINGS).resolve(spec)
    except InvalidRequest as refusal:
        assert refusal.field  # noqa: PT017 - refusing is one of two right answers
    else:
        assert len(resolved.sigmas) >= 2
