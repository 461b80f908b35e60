"""A VAE on another device than the transformer's: it works beside the steps, and harms none."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_service import messages
from dit_service.engine.developing import Developing
from dit_service.engine.pace import Pace
from zimage_core.errors import InvalidRequest

PATIENCE_SECONDS = 20
LATENTS = torch.zeros(16, 4, 4)


class ElsewhereVae:
    """Decodes when it may."""

    device, factor = torch.device("meta"), 8

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.decoded: list[Tensor] = []
        self.fault: Exception | None = None

    def decode(self, latents_CHW: Tensor) -> tuple[Tensor, Tensor]:
        assert self.may_go_on.wait(PATIENCE_SECONDS)
        self.decoded.append(latents_CHW)
        if self.fault:
            raise self.fault
        return torch.zeros(32, 32, 3, dtype=torch.uint8), torch.tensor(data=True)


def _begun(vae: Any) -> Developing:
    return Developing(vae, LATENTS, Pace("decode", 1e-3, lambda _what, _seconds: None))


def _until_there(developing: Developing) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not developing.is_there:
        assert time.monotonic() < until
        developing.wait()


def test_whoever_waits_looks_up_now_and_then() -> None:
    vae = ElsewhereVae()
    developing = _begun(vae)
    developing.wait()
    assert not developing.is_there, "it came back while the VAE was at work"
    vae.may_go_on.set()
    _until_there(developing)
    assert developing.picture(messages.Spent()).shape == (32, 32, 3)


def test_a_fault_is_the_pictures_own() -> None:
    vae = ElsewhereVae()
    vae.fault = InvalidRequest("no")
    vae.may_go_on.set()
    developing = _begun(vae)
    _until_there(developing)
    with pytest.raises(InvalidRequest):
        developing.picture(messages.Spent())


def test_what_nobody_wants_any_more_is_not_decoded() -> None:
    vae = ElsewhereVae()
    first, second, third = (_begun(vae) for _ in range(3))
    second.leave()
    vae.may_go_on.set()
    for one in (first, third):
        _until_there(one)
    assert len(vae.decoded) == 2


def test_a_vae_beside_the_transformer_needs_no_thread() -> None:
    done = torch.zeros(32, 32, 3, dtype=torch.uint8), torch.tensor(data=True)
    vae = SimpleNamespace(device=LATENTS.device, factor=8, decode=lambda _latents: done)
    assert _begun(vae).is_there
