"""The base install: a clean environment, the wheel, no torch and no numpy."""

import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, sys
import zimage_client, zimage_client.cli.main
heavy = ("torch", "numpy", "transformers", "diffusers")
assert not [name for name in heavy if importlib.util.find_spec(name)], "not light"
assert "site-packages" in zimage_client.__file__, "this is the checkout, not the wheel"
from zimage_client._embedded.stack import demo_model
assert "site-packages" in str(demo_model())
assert (demo_model() / "vae/diffusion_pytorch_model.safetensors").stat().st_size > 1_000_000
print("light")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_base_install_imports_without_torch_or_numpy(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "."]
    subprocess.run(install, cwd=ROOT, check=True, capture_output=True)
    run = subprocess.run(
        [python, "-I", "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "light", run.stderr
    client = tmp_path / "venv/bin/zimage-client"
    version = subprocess.run([client, "--version"], capture_output=True, text=True, check=True)
    assert "0.1.0" in version.stdout
    refused = subprocess.run(
        [client, "generate", "a circle", "-o", str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "pip install" in refused.stderr  # what the embedded stack needs
