"""Services that were given ComfyUI's files instead of a folder."""

import subprocess
import sys
from pathlib import Path

from tests import single_files
from tests.e2e.services import running
from zimage_client import Client


def test_both_services_work_from_single_files(tmp_path: Path) -> None:
    folder = single_files.build_folder(tmp_path / "folder")
    turbo = tmp_path / "z_image_turbo_bf16.safetensors"
    turbo.symlink_to(single_files.write_transformer(folder, tmp_path / "digest"))  # as caches do
    vae = single_files.write_vae(folder, tmp_path / "ae.safetensors")
    qwen = single_files.write_encoder(folder, tmp_path / "qwen_3_4b.safetensors")
    of_encoder = ("--model", str(qwen), "--tokenizer", str(folder / "tokenizer"))
    with running("encoder_service", *of_encoder) as encoder:
        flags = ("--model", str(turbo), "--vae", str(vae), "--variant", "turbo")
        with running("dit_service", *flags, "--encoder", encoder.address) as dit:
            encoder.wait_until("SERVING")
            dit.wait_until("SERVING")
            with Client(dit.address) as client:
                model = client.describe().model
                assert model is not None
                assert (model.name, model.variant, model.shift) == (turbo.stem, "turbo", 3.0)
                made = client.generate("a red circle", width=64, height=48, steps=2, seed=1)
    assert made.pictures[0].data.startswith(b"\x89PNG")
    assert made.completed.positive.token_count > 0


def test_a_file_alone_tells_too_little(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    command = [sys.executable, "-m", "dit_service", "--model", str(tmp_path / "x.safetensors")]
    where = ["--listen", "127.0.0.1:0", "--probes", ""]
    for given, missing in (([], "--variant"), (["--variant", "base"], "--vae")):
        done = subprocess.run(
            [*command, *where, *given], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert f"{missing} is not given" in done.stderr.splitlines()[-1]
