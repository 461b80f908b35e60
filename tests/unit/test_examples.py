"""The jobs that come as examples: read, and planned at full size for the cards that they name."""

import re
from pathlib import Path

import pytest

from zimage_client import _job_file
from zimage_core.formats.dataset_file import Example
from zimage_core.formats.published import DIT_SHAPE
from zimage_core.planning.training_memory import Base, Rows, largest
from zimage_core.wire import training

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
PICTURE = Example("0" * 64, 1, 1024, 1024, "a.png", "x")
RESERVED_BYTES = 1 << 30
CAPTION_ROWS = 512


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_the_card_in_its_name(path: Path) -> None:
    spec = _job_file.spec(_job_file.read(path), {}, [PICTURE])
    plan = training.plan(spec.training, DIT_SHAPE, "training")
    rows = [Rows((max(spec.sides_px) // 16) ** 2, CAPTION_ROWS)] * spec.batch_size
    form = next((one for one in ("int8", "nf4") if one in path.stem), "full")
    taken = largest(DIT_SHAPE, plan, rows, Base(2, form)).all + RESERVED_BYTES
    [gigabytes] = re.findall(r"(\d+)gb", path.stem)
    assert 0.5 * int(gigabytes) < taken / 2**30 < int(gigabytes)


def test_there_are_some() -> None:
    assert {path.stem.partition("-")[0] for path in EXAMPLES} == {"full", "lora"}
