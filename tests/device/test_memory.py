"""What a step takes of the device's memory, at full size, by the storages that live in it."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device.full_size import CONFIG, fake_samples, fake_transformer
from zimage_core.planning.flops import dit_row_elements
from zimage_core.planning.limits import padded


class Peak(TorchDispatchMode):
    """The most bytes that lived at once of those made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.bytes = max(self.bytes, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key)


@pytest.fixture(autouse=True)
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize(
    "samples",
    [
        [(128, 128, 128)],
        [(64, 64, 20)],
        [(128, 128, 128), (96, 64, 31)],
        [(64, 64, 20)] * 8,
    ],
)
def test_a_step_takes_what_is_planned_for_it(samples: list[tuple[int, int, int]]) -> None:
    transformer = fake_transformer()
    packed, layout = fake_samples(transformer, *samples)
    with torch.inference_mode(), Peak() as peak:
        transformer(packed, layout, "sdpa")
    rows = sum(padded(height * width // 4) + padded(length) for height, width, length in samples)
    planned = rows * dit_row_elements(CONFIG) * 2
    assert peak.bytes == pytest.approx(planned, rel=0.1)
