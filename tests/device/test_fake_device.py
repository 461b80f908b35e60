"""D1: a full-size forward on a GPU that is not there keeps to its device and never waits for it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device.full_size import CUDA, fake_samples, fake_transformer

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.index.Tensor,  # with a mask; with positions it is index_select
}


class OneDevice(TorchDispatchMode):
    """Refuses whatever waits for the device or crosses between it and the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.device == CUDA, f"{func} on {leaf.device}"
        return result


@pytest.mark.parametrize(
    "samples",
    [
        [(128, 128, 120)],
        [(128, 128, 120), (128, 128, 100)],
        [(128, 128, 8), (90, 160, 500), (22, 26, 33)],
    ],
    ids=["single", "equal", "mixed"],
)
def test_a_step_stays_on_its_device(samples: list[tuple[int, int, int]]) -> None:
    with FakeTensorMode(), torch.no_grad():
        transformer = fake_transformer()
        packed, layout = fake_samples(transformer, *samples)
        with OneDevice():
            velocities = transformer(packed, layout)
    assert [velocity.shape for velocity in velocities] == [(16, h, w) for h, w, _ in samples]
    assert all(velocity.dtype == torch.float32 for velocity in velocities)
    assert all(velocity.device == CUDA for velocity in velocities)


@pytest.mark.parametrize("wait", ["item", "cpu"])
def test_the_guard_sees_a_wait(wait: str) -> None:
    with FakeTensorMode():
        tensor = torch.empty(1, device=CUDA)
        with OneDevice(), pytest.raises(AssertionError):
            getattr(tensor, wait)()
