"""Safetensors files read without a tensor library, whole and broken."""

import json
import math
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from zimage_core.errors import InvalidModel, ZImageError
from zimage_core.formats import weights

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(2.0, dtype=torch.float16),
    "d": torch.zeros(0, 5),
    "e": torch.ones(3).to(torch.float8_e4m3fn),
}


def _write(path: Path, header: object, elements: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + elements)
    return path


def _entry(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    found = weights.read_all(tmp_path)
    assert {name: weight.shape for name, weight in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert [found[name].element_type for name in "abce"] == ["F32", "BF16", "F16", "F8_E4M3"]
    for name, tensor in TENSORS.items():
        assert bytes(found[name].data) == _bytes(tensor)


def test_shards_are_those_the_index_names(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "stranger.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights.read_all(tmp_path).keys() == {"a", "b"}


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: TENSORS[name]}, tmp_path / f"{name}.safetensors")
    assert weights.read_all(tmp_path).keys() == {"a", "b"}


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({"a": TENSORS["a"]}, tmp_path / name)
    with pytest.raises(InvalidModel, match="another file"):
        weights.read_all(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no \*\.safetensors"):
        weights.files(tmp_path)
    with pytest.raises(InvalidModel, match="nowhere: no such folder"):
        weights.files(tmp_path / "nowhere")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InvalidModel, match=r"gone\.safetensors") as refusal:
        weights.files(tmp_path)
    assert refusal.value.reason == "FILE_MISSING"
    for outside in ("../gone.safetensors", "/etc/passwd", "a/b.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(InvalidModel) as refusal:
            weights.files(tmp_path)
        assert refusal.value.reason == "FILE_OUTSIDE"
    index.write_text("{}")
    with pytest.raises(InvalidModel, match="weight_map"):
        weights.files(tmp_path)


@pytest.mark.parametrize(
    ("header", "length", "elements"),
    [
        (b"", 0, b""),  # no JSON at all
        (b"not json", None, b""),
        (b"[]", None, b""),
        (b"{}", 1 << 40, b""),  # a header longer than the file
        (_entry(), None, b"1234567"),  # cut off
        (_entry(data_offsets=[0, 4]), None, b"12345678"),
        (_entry(data_offsets=[-8, 0]), None, b"12345678"),
        (_entry(data_offsets=[8, 0]), None, b"12345678"),
        (_entry(data_offsets=[0]), None, b"12345678"),
        (_entry(shape=[3]), None, b"12345678"),
        (_entry(shape="two"), None, b"12345678"),
        (_entry(shape=[-1, -2]), None, b"12345678"),
        (_entry(shape=[2**62, 0]), None, b""),
        (_entry(shape=[1] * 9), None, b"1234"),
        (b'{"x":' + b"[" * 100_000, None, b""),
        (_entry(dtype="F31"), None, b"12345678"),
        ({"x": None}, None, b""),
    ],
)
def test_broken_files_are_refused(
    tmp_path: Path, header: object, length: int | None, elements: bytes
) -> None:
    path = _write(tmp_path / "model.safetensors", header, elements, length)
    with pytest.raises(InvalidModel) as refusal:
        list(weights.read_file(path))
    assert refusal.value.fields["path"] == str(path)


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_no_damage_makes_anything_but_a_typed_error(position: int, byte: int, cut: int) -> None:
    data = bytearray(save(TENSORS))
    data[position % len(data)] = byte
    with NamedTemporaryFile(suffix=".safetensors") as file, suppress(ZImageError):
        file.write(data[: cut or None])
        file.flush()
        for _, weight in weights.read_file(Path(file.name)):
            size = weights.ELEMENT_BYTES[weight.element_type]
            assert len(weight.data) == math.prod(weight.shape) * size


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_without_even_a_length_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidModel):
        list(weights.read_file(path))
