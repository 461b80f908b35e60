"""D7: what a Mac's GPU is asked for has no float64 and no complex numbers: it knows neither."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_service.model.attention.backend import Backend, Place
from dit_service.model.attention.backends import BACKENDS
from dit_service.model.narrow import obstacle
from tests.device.full_size import fake_samples, fake_transformer

MPS = torch.device("mps", 0)
UNKNOWN = {torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn}


class Mac(TorchDispatchMode):
    """Refuses what a Mac's GPU would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "mps":
                assert leaf.dtype not in UNKNOWN, f"{func} of {leaf.dtype}"
        return result


def test_a_picture_needs_nothing_that_a_mac_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention apart, which PyTorch dispatches to a kernel that is not there."""
    empty = Backend(lambda _q, _k, v_THE, _lengths, _bounds: torch.empty_like(v_THE))
    monkeypatch.setitem(BACKENDS, "sdpa", empty)
    with FakeTensorMode(), torch.no_grad(), Mac():
        transformer = fake_transformer(MPS)
        packed, layout = fake_samples(transformer, (128, 128, 120), (64, 64, 8))
        velocities = transformer(packed, layout)
    assert [velocity.device.type for velocity in velocities] == ["mps", "mps"]


@pytest.mark.parametrize("dtype", sorted(UNKNOWN, key=str))
def test_the_guard_sees_what_a_mac_lacks(dtype: torch.dtype) -> None:
    with FakeTensorMode(), Mac(), pytest.raises(AssertionError, match=str(dtype)):
        torch.empty(2, device=MPS).to(dtype)


def test_forms_that_a_mac_lacks_are_not_offered_there() -> None:
    place = Place(MPS, (0, 0), torch.bfloat16, 128)
    assert obstacle("fp8", place)
    assert not obstacle("int8", place)
