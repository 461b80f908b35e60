"""Narrow weights of the encoder: what each form loses, and what it does not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from encoder_service.model import narrow
from encoder_service.model.loading import load
from encoder_service.model.narrow import INT4, INT8, INT8_DYNAMIC
from encoder_service.model.qwen import Text
from zimage_core.errors import InvalidSettings
from zimage_core.formats.encoder_files import EncoderFiles

CPU = torch.device("cpu")
TOKENS = list(range(40))
OFFERED = {INT8: 0.999} | ({} if narrow.obstacle(INT8_DYNAMIC, CPU) else {INT8_DYNAMIC: 0.99})
"""What this CPU can do, with the least cosine."""


def _weight(outputs: int = 96, inputs: int = 256) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) * 0.02


def _tokens(count: int = 50, inputs: int = 256) -> Tensor:
    """The first one a thousand times as large as the others, as the encoder's is."""
    drawn = torch.randn(count, inputs, generator=torch.Generator().manual_seed(2))
    drawn[0] *= 1000
    return drawn


def _run(module: nn.Module, tokens: Tensor) -> Tensor:
    product: Tensor = module(tokens.unsqueeze(0))
    assert product.dtype == tokens.dtype
    return product.squeeze(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "least"), [(INT8, 0.9999), (INT8_DYNAMIC, 0.999), (INT4, 0.99)])
def test_every_token_keeps_its_direction(form: str, least: float, dtype: torch.dtype) -> None:
    tokens = _tokens().to(dtype)
    module = narrow.linear(_weight().to(dtype), form, CPU)
    found = _run(module, tokens).float()
    assert cosine_similarity(found, tokens.float() @ _weight().T).min() > least


def test_two_bytes_of_a_token_lose_nothing_beside_the_weights() -> None:
    """What is left is the weights' own rounding, as if they had been widened."""
    tokens = _tokens()
    exact = _run(narrow.WidenedIntegers(_weight()), tokens)
    found = _run(narrow.Integers(_weight(), is_dynamic=False), tokens)
    largest = exact.abs().amax(1, keepdim=True)
    assert ((found - exact).abs() / largest).max() < 1e-4


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_no_token_changes_another(is_dynamic: bool) -> None:
    module, tokens = narrow.Integers(_weight(), is_dynamic=is_dynamic), _tokens()
    before = tokens.clone()
    together = _run(module, tokens)
    assert torch.equal(tokens, before)
    for at in range(len(tokens)):
        assert torch.equal(together[at : at + 1], _run(module, tokens[at : at + 1]))


@pytest.mark.parametrize("count", [1, 16, 17, 50])
def test_another_device_multiplies_the_same_integers(count: int) -> None:
    tokens = _tokens(count)
    found = _run(narrow.CudaIntegers(_weight()), tokens)
    whole = _run(narrow.linear(_weight(), INT8_DYNAMIC, CPU), tokens)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_half_bytes_are_the_same_however_they_lie() -> None:
    tokens = _tokens()
    packed = _run(narrow.PackedHalves(_weight()), tokens)
    widened = _run(narrow.WidenedHalves(_weight()), tokens)
    largest = widened.abs().amax(1, keepdim=True)
    assert ((packed - widened).abs() / largest).max() < 1e-4


def test_half_bytes_need_whole_groups() -> None:
    assert not isinstance(
        narrow.linear(_weight(inputs=96), INT4, CPU), narrow.PackedHalves | narrow.WidenedHalves
    )
    assert isinstance(narrow.linear(_weight(outputs=90), INT4, CPU), narrow.WidenedHalves)


def test_what_a_device_cannot_do_is_refused_by_name() -> None:
    assert "MPS" in narrow.obstacle(INT8_DYNAMIC, torch.device("mps"))
    for form in (narrow.FULL, INT8, INT4):
        for kind in ("cpu", "cuda", "mps"):
            assert not narrow.obstacle(form, torch.device(kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_fit_half_precision_where_weights_are_widened(dtype: torch.dtype) -> None:
    tokens, weight = _tokens(), _weight()
    for kind in (narrow.WidenedIntegers, narrow.WidenedHalves):
        found = _run(kind(weight.to(dtype)), tokens.to(dtype)).float()
        assert cosine_similarity(found, tokens @ weight.T).min() > 0.99


def test_an_old_cpu_takes_the_slower_way(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert isinstance(narrow.linear(_weight(), INT8, CPU), narrow.WidenedIntegers)
    with pytest.raises(InvalidSettings, match=r"int8_dynamic: this CPU .* take int8 or full"):
        load(EncoderFiles.of(model_folder), -2, "cpu", "float32", INT8_DYNAMIC)


@pytest.mark.parametrize(("form", "least"), OFFERED.items())
def test_a_whole_encoder(model_folder: Path, form: str, least: float) -> None:
    files, text = EncoderFiles.of(model_folder), Text(TOKENS, ((-2, 1.0),))
    [exact] = load(files, -2, "cpu", "float32")([text])
    encoder = load(files, -2, "cpu", "float32", form)
    assert encoder.linears() == set()
    [found] = encoder([text])
    assert cosine_similarity(found.state, exact.state).min() > least
    others = [Text(list(range(index, 60)), ((-2, 1.0),)) for index in range(3)]
    [again, *_] = encoder([text, *others])
    torch.testing.assert_close(
        again.state, found.state, rtol=0, atol=1e-5 * float(found.state.abs().max())
    )
