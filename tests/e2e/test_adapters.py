"""Adapters on a running pair of services: by file, by name, by receipt, several at once, and what
cannot be."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from demo_model.random_model import Shape
from dit_service.model.config import TransformerConfig
from tests import adapter_files
from tests.adapter_files import Lora
from tests.e2e.services import Service, running
from zimage_client import (
    Accepted,
    Client,
    Generated,
    InvalidRequest,
    NotFound,
    NotReady,
    Options,
    Overloaded,
    Progress,
    read_receipt,
)
from zimage_client.cli.main import main as command
from zimage_core.planning.linears import linears

PROMPT = "a red circle on a blue background"
WISH = Options(steps=6, seed=4, width=64, height=64)
ALONE = Options(**WISH, packing="solo")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Iterator[Service]:
    with running("encoder_service", "--model", str(model_folder)) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(model_folder: Path, encoder: Service, store: Path) -> Iterator[Service]:
    flags = "--model", str(model_folder), "--encoder", encoder.address, "--store", str(store)
    with running("dit_service", *flags, "--max-adapter-bytes", "4000000") as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture
def client(dit: Service) -> Iterator[Client]:
    with Client(dit.address) as client:
        yield client


def _linears() -> dict[str, tuple[int, int]]:
    values = {"all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "norm_eps": 1e-5}
    values |= {"rope_theta": 256.0, "t_scale": 1000.0}
    return linears(TransformerConfig.from_values(values | Shape().transformer))


def _lora(seed: int, rank: int = 4) -> Lora:
    return adapter_files.random_lora(_linears(), rank, seed)


def _file(folder: Path, seed: int, layout: str = "diffusion_model, baked") -> Path:
    return adapter_files.write(folder / f"{seed}.safetensors", _lora(seed), layout)


def _rgb(made: Generated) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(made.pictures[0].data)), int)


def _pixels(client: Client, wish: Options) -> str:
    [picture] = client.generate(PROMPT, **wish).pictures
    return picture.pixels_sha256


def test_a_file_goes_where_it_is_needed_once(client: Client, tmp_path: Path) -> None:
    file = _file(tmp_path, 1)
    wish = Options(**ALONE, adapters={file: 0.8})
    events = list(client.stream(PROMPT, **wish))
    assert Progress("sending") in events
    [accepted] = [event for event in events if isinstance(event, Accepted)]
    [use] = accepted.adapters
    assert (use.name, use.scale) == ("", 0.8)
    assert Progress("sending") not in list(client.stream(PROMPT, **wish))
    changed, plain = _pixels(client, wish), _pixels(client, ALONE)
    assert changed != plain
    assert _pixels(client, Options(**ALONE, adapters={use.sha256: 0.8})) == changed
    assert _pixels(client, Options(**ALONE, adapters={use.sha256: 0.0})) == plain
    assert _pixels(client, Options(**ALONE, adapters={use.sha256: 0.7})) != changed


def test_a_name_stays_until_it_is_taken_away(client: Client, tmp_path: Path) -> None:
    first, second = _file(tmp_path, 1), _file(tmp_path, 2, "kohya, fused")
    added = client.add_adapter("style", first)
    assert (added.rank, added.linear_count) == (4, len(_linears()))
    assert client.add_adapter("style", first) == added == client.get_adapter("style")
    with pytest.raises(NotReady, match="another file") as refusal:
        client.add_adapter("style", second)
    assert refusal.value.reason == "ADAPTER_EXISTS"
    by_name = Options(**ALONE, adapters={"style": 1.0})
    before = _pixels(client, by_name)
    assert before == _pixels(client, Options(**ALONE, adapters={first: 1.0}))
    moved = client.add_adapter("style", second, replace=True)
    assert moved.rank == 12  # q, k and v as one
    assert _pixels(client, by_name) == _pixels(client, Options(**ALONE, adapters={second: 1.0}))
    assert [(one.name, one.sha256) for one in client.list_adapters()] == [("style", moved.sha256)]
    client.remove_adapter("style")
    assert client.list_adapters() == []
    for ask in (client.get_adapter, client.remove_adapter):
        with pytest.raises(NotFound, match="no adapter style; there is none"):
            ask("style")
    with pytest.raises(NotFound, match=r"spec.adapters\[0\].name: there is no adapter style"):
        _pixels(client, by_name)


def test_there_may_be_many_names(client: Client, dit: Service, tmp_path: Path) -> None:
    file = _file(tmp_path, 1)
    names = [f"many-{number:03}" for number in range(120)]
    for name in names:
        client.add_adapter(name, file)
    assert [one.name for one in client.list_adapters()] == names
    for name in names:
        client.remove_adapter(name)


def test_everybody_has_their_own_adapters_in_one_step(client: Client, tmp_path: Path) -> None:
    """More of them than may stay on the device, and each picture as if it were alone."""
    adapters = [_file(tmp_path, seed) for seed in range(1, 5)]
    wishes = [Options(**WISH)] + [Options(**WISH, adapters={one: 0.9}) for one in adapters]
    wishes += [Options(**WISH, adapters={a: 0.4, b: -0.6}) for a, b in pairwise(adapters)]

    def made(wish: Options) -> Generated:
        return client.generate(PROMPT, **wish)

    alone = [made(Options(**wish, packing="solo")) for wish in wishes]  # type: ignore[misc]
    with ThreadPoolExecutor(len(wishes)) as pool:
        together = list(pool.map(made, wishes))
    assert max(one.completed.usage.mean_occupancy for one in together) > 2
    assert len({one.pictures[0].pixels_sha256 for one in alone}) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert np.abs(_rgb(one) - _rgb(other)).max() <= 1


def test_a_receipt_names_the_files(
    dit: Service, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path, 5)
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    flags = ["--server", dit.address, "--isolated"]
    assert command(["adapters", "add", "sketch", str(file), *flags]) == 0
    wish = ["--steps", "6", "--width", "64", "--height", "64", "--solo"]
    made = ["generate", PROMPT, *flags, *wish, "--adapter", "sketch:0.8", "-o", str(out)]
    assert command(made) == 0
    sha256 = client.get_adapter("sketch").sha256
    assert read_receipt(out).options["adapters"] == {sha256: 0.8}
    assert command(["inspect", str(out)]) == 0
    assert f"{sha256}, 0.8" in capsys.readouterr().out
    assert command(["adapters", "remove", "sketch", *flags]) == 0
    assert command(["generate", *flags, "--from", str(out), "-o", str(again)]) == 0
    assert read_receipt(again).pixels_sha256 == read_receipt(out).pixels_sha256
    assert command(["verify", *flags, str(out)]) == 0
    capsys.readouterr()


def test_the_command_line_shows_them(
    dit: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--server", dit.address, "--isolated"]
    path = _file(tmp_path, 6, "transformer, settings")
    assert command(["adapters", "add", "ink", str(path), *flags]) == 0
    assert command(["adapters", "list", *flags]) == 0
    assert command(["adapters", "show", "ink", *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ink  0.") == 3
    assert "lora_adapter_metadata: {" in shown
    assert command(["adapters", "show", "ink", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 4
    assert command(["adapters", "remove", "ink", *flags]) == 0
    assert command(["adapters", "show", "ink", *flags]) == 3
    assert "there is no adapter ink" in capsys.readouterr().err


def test_a_file_by_two_names_adds_up_and_a_folder_of_peft_is_one(
    client: Client, tmp_path: Path
) -> None:
    lora = _lora(8)
    file = adapter_files.write(tmp_path / "8.safetensors", lora, "peft")
    for name in ("one", "other"):
        client.add_adapter(name, file)
    twice = client.generate(PROMPT, **ALONE, adapters={"one": 0.5, "other": 0.3})
    picture = tmp_path / "twice.png"
    picture.write_bytes(twice.pictures[0].data)
    options = read_receipt(picture).options
    assert list((options["adapters"] or {}).values()) == [0.8]
    assert _pixels(client, Options(**ALONE, adapters={"one": 0.8})) == (
        twice.pictures[0].pixels_sha256
    )
    for name in ("one", "other"):
        client.remove_adapter(name)
    folder = tmp_path / "folder"
    folder.mkdir()
    tensors, _ = adapter_files.LAYOUTS["peft"](lora)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": lora.strength * lora.rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for source in (folder, folder / "adapter_model.safetensors"):
        assert _pixels(client, Options(**ALONE, adapters={source: 0.8})) == (
            twice.pictures[0].pixels_sha256
        )


def test_what_cannot_be_used_is_refused_by_name(client: Client, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.safetensors"
    wider = {name: (o, i + 8) for name, (o, i) in _linears().items()}
    adapter_files.write(stranger, adapter_files.random_lora(wider), "peft")
    for ask in (
        lambda: client.add_adapter("x", stranger),
        lambda: client.generate(PROMPT, **WISH, adapters={stranger: 1.0}),
    ):
        with pytest.raises(InvalidRequest, match="for this model it would be") as refusal:
            ask()
        assert refusal.value.reason == "ADAPTER_SHAPE"
    large = adapter_files.write(tmp_path / "large.safetensors", _lora(1, rank=64), "peft")
    with pytest.raises(Overloaded, match="max_adapter_bytes"):
        client.generate(PROMPT, **WISH, adapters={large: 1.0})
    with pytest.raises(NotFound, match="there is no adapter 0000"):
        client.generate(PROMPT, **WISH, adapters={"0" * 64: 1.0})
    with pytest.raises(InvalidRequest, match=r"adapters\[0\]\.scale: nan given"):
        client.generate(PROMPT, **WISH, adapters={"x": float("nan")})
    with pytest.raises(InvalidRequest, match=r"spec\.adapters: 17 given, allowed is 16 at most"):
        client.generate(PROMPT, **WISH, adapters={f"x{number}": 1.0 for number in range(17)})
    with pytest.raises(InvalidRequest, match="No such file"):
        client.generate(PROMPT, **WISH, adapters={tmp_path / "none.safetensors": 1.0})
    assert _pixels(client, ALONE)  # nothing broke


def test_another_replica_with_the_same_store_knows_them(
    client: Client, encoder: Service, store: Path, model_folder: Path, tmp_path: Path
) -> None:
    client.add_adapter("shared", _file(tmp_path, 7))
    wish = Options(**ALONE, adapters={"shared": 1.0})
    here = _pixels(client, wish)
    flags = "--model", str(model_folder), "--encoder", encoder.address, "--store", str(store)
    with running("dit_service", *flags) as other:
        other.wait_until("SERVING")
        with Client(other.address) as elsewhere:
            assert _pixels(elsewhere, wish) == here
    client.remove_adapter("shared")
