"""Adapters on the device: read while others go on, bounded by room, kept by use."""

import math
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_service.engine.adapters import Adapters, Unready
from dit_service.messages import AdapterUse
from dit_service.model.adapters import Uses
from dit_service.model.loading import load_transformer
from tests import adapter_files
from zimage_core.errors import InvalidRequest, Overloaded
from zimage_core.planning.linears import linears

LINEARS = {"layers.0.attention.to_q": (192, 192)}


@pytest.fixture
def files(tmp_path: Path) -> list[AdapterUse]:
    made = []
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        adapter_files.write(path, adapter_files.random_lora(LINEARS, seed=number), "bare")
        made.append(AdapterUse(f"{number}", path.stat().st_size, path, 0.5))
    return made


@pytest.fixture
def adapters(model_folder: Path, files: list[AdapterUse]) -> Adapters:
    """With room for two of them: in float32, a file of 16-bit numbers would take twice its size."""
    model = load_transformer(model_folder, torch.device("cpu"), torch.float32)
    room = 2.5 * 2 * files[0].size_bytes
    return Adapters(model, room, lambda _what, _seconds: None)


def _end(borrowing: Generator[Unready, object, Uses]) -> Uses:
    """What it returns, once it has what it waits for."""
    try:
        while True:
            next(borrowing).wait()
    except StopIteration as end:
        uses: Uses = end.value
        return uses


def test_who_finds_no_room_waits_for_it(adapters: Adapters, files: list[AdapterUse]) -> None:
    first, second, third = files
    uses = _end(adapters.borrowed([first, second]))
    assert [use.scale for use in uses] == [0.5, 0.5]
    waiting = adapters.borrowed([third])
    assert [next(waiting).is_there for _ in range(3)] == 3 * [True]  # nothing is on its way
    assert _end(adapters.borrowed([second, first])) == uses[::-1]  # what is there needs no room
    for _ in range(2):
        adapters.give_back([first, second])
    assert len(_end(waiting)) == 1
    assert _end(adapters.borrowed([first]))[0].adapter is uses[0].adapter
    adapters.give_back([first])
    assert _end(adapters.borrowed([second]))[0].adapter is not uses[1].adapter  # it had to go
    with pytest.raises(Overloaded, match="max_adapter_bytes"):
        next(adapters.borrowed(files))


def test_what_cannot_be_read_may_be_another_time(
    adapters: Adapters, files: list[AdapterUse], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="no usable safetensors"):
            _end(adapters.borrowed([replace(files[0], file=broken)]))
    assert len(_end(adapters.borrowed(files[:1]))) == 1


def test_it_is_read_beside_the_work(model_folder: Path, tmp_path: Path) -> None:
    """Also for one who leaves meanwhile."""
    model = load_transformer(model_folder, torch.device("cpu"), torch.float32)
    adapters = Adapters(model, math.inf, lambda _what, _seconds: None)
    path = tmp_path / "large.safetensors"
    lora = adapter_files.random_lora(linears(model.config), rank=64)
    adapter_files.write(path, lora, "bare")
    file = AdapterUse("large", path.stat().st_size, path, 1.0)
    leaving, staying = adapters.borrowed([file]), adapters.borrowed([file])
    unready = next(leaving)
    assert next(staying).loading is unready.loading
    leaving.close()
    until = time.monotonic() + 30
    while not unready.is_there:
        assert time.monotonic() < until
        time.sleep(0.001)
    assert len(_end(staying)) == 1
