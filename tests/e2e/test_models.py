"""`zimage-client models` against a hub on this machine, through huggingface_hub's own client."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.services import clean_environment, running
from tests.fakes.hub import REVISION, Hub, serving
from zimage_client import Client
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.wire.identities import encoder_identities

REPOSITORY = "somebody/tiny"
ENCODER_FILES = {"text_encoder/config.json", "text_encoder/model.safetensors"} | {
    "tokenizer/tokenizer.json"
}


@pytest.fixture
def published(model_folder: Path, tmp_path: Path) -> Path:
    """With what repositories have besides: another format, a picture, a readme."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "published"))
    (folder / "README.md").write_text("# A model")
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(b"another variant")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"another format")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serving(REPOSITORY, published) as hub:
        yield hub


def models(hub: Hub | None, shelf: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, once it has ended."""
    with _begun(hub, shelf, *arguments) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _begun(hub: Hub | None, shelf: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A process of its own: its library reads the endpoint when it is loaded."""
    environment = clean_environment(shelf.parent)
    environment |= {"HF_HOME": str(shelf.parent / "hf"), "ZIMAGE_CLIENT__MODELS": str(shelf)}
    if hub:
        environment["HF_ENDPOINT"] = hub.endpoint
    return subprocess.Popen(
        [sys.executable, "-m", "zimage_client.cli.main", "models", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files_in(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in found}
    return names - {"zimage-model.json", ".incoming/lock"}


def test_an_encoder_is_fetched_served_checked_and_removed(hub: Hub, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    added = models(hub, shelf, "add", REPOSITORY, "--parts", "encoder", "--revision", "v1")
    assert added.returncode == 0, added.stderr
    assert "3 files to fetch" in added.stderr
    folder = shelf / REPOSITORY
    assert files_in(folder) == ENCODER_FILES
    assert {name for name, _ in hub.asked} == ENCODER_FILES
    with running("encoder_service", "--model", str(folder)) as service:
        service.wait_until("SERVING")
        with Client(encoder=service.address) as client:
            assert client.encode("a cat").identity

    hub.asked.clear()
    assert "0 files to fetch" in models(hub, shelf, "add", REPOSITORY, "--parts=encoder").stderr
    assert not hub.asked

    [listed] = models(hub, shelf, "list", "--json").stdout.splitlines()
    assert json.loads(listed) == {
        "model": REPOSITORY,
        "path": str(folder),
        "parts": ["encoder"],
        "revision": REVISION,
        "bytes": sum((folder / name).stat().st_size for name in ENCODER_FILES),
    }

    assert models(None, shelf, "verify", REPOSITORY).returncode == 0
    weights = folder / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    torn = models(None, shelf, "verify", REPOSITORY)
    assert torn.returncode == 1
    assert "text_encoder/model.safetensors" in torn.stdout
    assert "1 files to fetch" in models(hub, shelf, "add", REPOSITORY, "--parts=encoder").stderr
    assert models(None, shelf, "verify", REPOSITORY).returncode == 0

    (folder / "notes.txt").write_text("mine")
    assert models(None, shelf, "remove", REPOSITORY).returncode == 0
    assert files_in(folder) == {"notes.txt"}
    assert models(None, shelf, "list").stdout == ""
    gone = models(None, shelf, "verify", REPOSITORY)
    assert gone.returncode == 3
    assert "no such model" in gone.stderr


def test_all_parts_make_a_model_that_draws(hub: Hub, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    assert models(hub, shelf, "add", REPOSITORY, "--parts", "dit").returncode == 0
    assert not (shelf / REPOSITORY / "text_encoder").exists()
    assert models(hub, shelf, "add", REPOSITORY).returncode == 0
    assert not {name for name in files_in(shelf / REPOSITORY) if "fp16" in name or "bin" in name}
    folder = str(shelf / REPOSITORY)
    with (
        running("encoder_service", "--model", folder) as encoder,
        running("dit_service", "--model", folder, "--encoder", encoder.address) as dit,
        Client(dit.address) as client,
    ):
        dit.wait_until("SERVING")
        assert client.generate("a cat", steps=1, width=128, height=128).pictures


def test_what_was_interrupted_goes_on(hub: Hub, tmp_path: Path) -> None:
    """In the middle of a file."""
    shelf = tmp_path / "shelf"
    name, part = "text_encoder/model.safetensors", 12 << 20
    path = hub.folder / name
    save_file(load_file(path) | {"besides": torch.rand(4, 1 << 20)}, path)
    hub.stops_after[name] = part
    with _begun(hub, shelf, "add", REPOSITORY, "--parts=encoder") as process:
        assert hub.stopped.wait(60)
        time.sleep(1)  # until the bytes are there
        process.kill()
    assert models(hub, shelf, "add", REPOSITORY, "--parts=encoder").returncode == 0
    [_, again] = [asked for file, asked in hub.asked if file == name]
    begin = int(again.removeprefix("bytes=").removesuffix("-"))
    assert 0 < begin <= part
    assert (shelf / REPOSITORY / name).read_bytes() == path.read_bytes()
    assert [path.name for path in (shelf / REPOSITORY / ".incoming").iterdir()] == ["lock"]


def test_ctrl_c_ends_it(hub: Hub, tmp_path: Path) -> None:
    hub.stops_after["text_encoder/config.json"] = 0
    with _begun(hub, tmp_path / "shelf", "add", REPOSITORY, "--parts=encoder") as process:
        assert hub.stopped.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


def test_what_is_not_as_promised_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    for name in ("text_encoder/model.safetensors", "text_encoder/config.json"):
        shelf = tmp_path / Path(name).stem
        hub.spoilt = {name}
        refused = models(hub, shelf, "add", REPOSITORY, "--parts=encoder")
        assert refused.returncode == 3
        assert "its source says" in refused.stderr
        assert not (shelf / REPOSITORY / name).exists()
    hub.spoilt = set()
    assert models(hub, shelf, "add", REPOSITORY, "--parts=encoder").returncode == 0
    assert models(None, shelf, "verify", REPOSITORY).returncode == 0


def test_float32_that_holds_bfloat16_takes_half(
    hub: Hub, model_folder: Path, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    path = hub.folder / "text_encoder" / "model.safetensors"
    path.with_name("model.fp16.safetensors").unlink()
    narrow = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file({name: value.float() for name, value in narrow.items()}, path)
    identities = encoder_identities(EncoderFiles.of(hub.folder), tmp_path / "one")
    assert models(hub, shelf, "add", REPOSITORY, "--parts=encoder").returncode == 0
    kept = shelf / REPOSITORY
    came = load_file(kept / "text_encoder" / "model.safetensors")
    assert came.keys() == narrow.keys()
    assert all(torch.equal(came[name], narrow[name]) for name in came)
    assert {value.dtype for value in came.values()} == {torch.bfloat16}
    assert encoder_identities(EncoderFiles.of(kept), tmp_path / "two") == identities
    assert "0 files to fetch" in models(hub, shelf, "add", REPOSITORY, "--parts=encoder").stderr
    assert models(None, shelf, "verify", REPOSITORY).returncode == 0


def test_another_revision_takes_the_place_of_the_first(hub: Hub, tmp_path: Path) -> None:
    """Also where it has fewer files: an index that stayed would lead to the old weights."""
    shelf, folder = tmp_path / "shelf", hub.folder / "text_encoder"
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    save_file(whole, folder / shard)
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(whole, shard)}))
    assert models(hub, shelf, "add", REPOSITORY).returncode == 0
    assert {f"text_encoder/{shard}", f"text_encoder/{index}"} < files_in(shelf / REPOSITORY)

    (folder / shard).unlink()
    (folder / index).unlink()
    save_file({name: value * 2 for name, value in whole.items()}, folder / "model.safetensors")
    hub.revision = "f" * 40
    refused = models(hub, shelf, "add", REPOSITORY, "--parts=encoder")
    assert refused.returncode == 3
    assert "its dit is here at 0123" in refused.stderr
    assert models(hub, shelf, "add", REPOSITORY).returncode == 0
    assert files_in(shelf / REPOSITORY) >= ENCODER_FILES
    assert not [name for name in files_in(shelf / REPOSITORY) if "00001" in name or index in name]
    assert models(None, shelf, "verify", REPOSITORY).returncode == 0
    [listed] = models(None, shelf, "list", "--json").stdout.splitlines()
    assert json.loads(listed)["revision"] == hub.revision


def test_what_is_no_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    (hub.folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    refused = models(hub, shelf, "add", REPOSITORY, "--parts", "dit")
    assert refused.returncode == 3
    assert (
        "no dit in it: it lacks transformer/diffusion_pytorch_model.safetensors" in refused.stderr
    )
    shutil.rmtree(hub.folder)
    hub.folder.mkdir()
    (hub.folder / "README.md").write_text("# Soon")
    assert models(hub, shelf, "add", REPOSITORY, "--parts", "encoder").returncode == 3


def test_neither_names_nor_lists_are_mixed_up(published: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    assert models(None, shelf, "add", str(published), "--parts", "encoder").returncode == 0
    other = tmp_path / "elsewhere" / "published"
    shutil.copytree(published, other)
    refused = models(None, shelf, "add", str(other), "--parts", "dit")
    assert refused.returncode == 3
    assert "another model of that name is here" in refused.stderr
    (shelf / "broken").mkdir()
    (shelf / "broken" / "zimage-model.json").write_text("{")
    listed = models(None, shelf, "list")
    assert listed.stdout.startswith("published")
    assert "this list of files cannot be read" in listed.stderr
    assert models(None, shelf, "verify", "published").returncode == 0


def test_a_folder_or_a_file_of_this_machine(published: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    assert models(None, shelf, "add", str(published), "--parts", "encoder").returncode == 0
    assert files_in(shelf / "published") == ENCODER_FILES
    single = published / "text_encoder" / "model.safetensors"
    assert models(None, shelf, "add", str(single)).returncode == 0
    added = shelf / single.name / single.name
    assert (
        hashlib.sha256(added.read_bytes()).digest() == hashlib.sha256(single.read_bytes()).digest()
    )
    named = models(None, shelf, "list").stdout.splitlines()
    assert [line.split()[0] for line in named] == [single.name, "published"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["somebody/else"], 3, "no such folder, file or repository"),
        (["no name/of a/repository"], 3, "OWNER/NAME"),
        ([REPOSITORY, "--revision", "v9"], 3, "no such revision"),
        ([REPOSITORY, "--parts", "vae"], 2, "allowed are encoder, dit"),
        ([REPOSITORY, "--file", "none.safetensors"], 3, "no none.safetensors in it"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    hub: Hub, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    refused = models(hub, tmp_path / "shelf", "add", *arguments)
    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr


def test_a_hub_that_is_away_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    refused = models(hub, tmp_path / "shelf", "add", REPOSITORY)
    assert refused.returncode == 4
    assert "the hub does not answer" in refused.stderr
    assert os.path.basename(REPOSITORY) in refused.stderr
