"""`make parity` exits non-zero when a row is missed: shown with one weight moved by 1e-3."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_ROW = "-k 'test_single and odd and 33'"


@pytest.mark.slow
@pytest.mark.parametrize(("moved_by", "passes"), [("0", True), ("1e-3", False)])
def test_a_moved_weight_fails_the_target(moved_by: str, passes: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", "parity", f"PARITY={ONE_ROW} --move-a-weight {moved_by}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode == 0) is passes, result.stdout
    assert ("failed" in result.stdout) is not passes
