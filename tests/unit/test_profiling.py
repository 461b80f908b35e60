"""Profiles: which tests a name means, how a result reads, how alike two pictures are."""

import numpy as np
import pytest
from PIL import Image

from zimage_client.cli import profiling
from zimage_client.cli.main import main as command
from zimage_client.cli.profiling import Result
from zimage_core.pictures.files import PictureFile


def test_aliases_mean_what_the_names_say() -> None:
    assert profiling.tests("encode") == profiling.ALL[:5]
    assert profiling.tests("generate,encode_short") == ("full_generation", "encode_short")
    assert profiling.tests("encode_short,encode")[0] == "encode_short"
    assert len(profiling.tests("encode,encode_short")) == 5
    with pytest.raises(ValueError, match="encoding: known are encode, generate, encode_short"):
        profiling.tests("encoding")


def test_a_result_reads_as_one_line() -> None:
    good = Result("encode_short", True, 45.31, None, 100.2, 110.9, 120.0, {"tokens": 12})
    assert "[PASS] 45.3ms | Memory: 100 -> 111 MB (peak: 120 MB)" in str(good)
    bad = Result("full_generation", False, 3.0, "no encoder", None, None, None, {})
    assert str(bad).endswith("[FAIL] 3.0ms | no encoder")
    assert profiling.summary([good, bad]) == {
        "total_tests": 2,
        "passed": 1,
        "failed": 1,
        "total_time_ms": 48.31,
        "peak_memory_mb": 120.0,
    }


def _picture(values: np.ndarray) -> PictureFile:
    rgb = np.repeat(values.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    return PictureFile(Image.fromarray(rgb), "", is_lossless=True)


def test_likeness_of_structures_is_that_of_its_definition() -> None:
    chance = np.random.default_rng(0)
    one = chance.integers(0, 256, (64, 48)).astype(float)
    other = (
        (0.7 * one + 30 + chance.normal(0, 20, one.shape)).clip(0, 255).astype(int).astype(float)
    )
    windows = [
        grey.reshape(8, 8, 6, 8).transpose(0, 2, 1, 3).reshape(48, 64) for grey in (one, other)
    ]
    a, b = windows
    covariance = (a * b).mean(1) - a.mean(1) * b.mean(1)
    c1, c2 = 2.55**2, 7.65**2
    expected = (
        (2 * a.mean(1) * b.mean(1) + c1)
        * (2 * covariance + c2)
        / ((a.mean(1) ** 2 + b.mean(1) ** 2 + c1) * (a.var(1) + b.var(1) + c2))
    ).mean()
    assert _picture(one).ssim(_picture(other)) == pytest.approx(expected, abs=1e-4)
    assert _picture(one).ssim(_picture(one)) == pytest.approx(1)
    assert _picture(one).ssim(_picture(255 - one)) < 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tests", "encoding"], "known are"),
        (["--repeat", "0"], "no number from 1 to 1000"),
    ],
)
def test_what_is_no_profile_is_refused(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        command(["profile", "--isolated", *flags])
    assert refusal.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_model_is_for_services_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["profile", "--isolated", "--model", "x"]) == 2
    assert "--model is for --sweep" in capsys.readouterr().err
