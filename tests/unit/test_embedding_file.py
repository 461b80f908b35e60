import contextlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from zimage_core.embeddings import Embedding, Numerics, Prompt, Recipe
from zimage_core.errors import InvalidRequest, NotFound, ZImageError
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.embedding import EmbeddingFile
from zimage_core.tensors import TensorData

PROMPT = Prompt("a red circle", system="draw", force_think_block=True, hidden_layer=-2)


def embedding(element_type: str = "bfloat16") -> Embedding:
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[element_type]
    return Embedding(
        tensor=TensorData(element_type, (3, 5), bytes(range(15 * size))),
        identity="ab" * 32,
        recipe=Recipe(chat_format=1, hidden_layer=-2, token_limit=512),
        numerics=Numerics("bfloat16", "bfloat16", "transformers 5.23.0", "cpu"),
        token_count=3,
        token_ids_sha256="cd" * 32,
    )


def altered(**changes: Any) -> bytes:
    """A file of ours in which the description says something else; None takes the key out."""
    data = embedding_file.dump(EmbeddingFile(embedding(), PROMPT))
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    description = {**json.loads(header["__metadata__"]["zimage"]), **changes}
    kept = {key: value for key, value in description.items() if value is not None}
    header["__metadata__"]["zimage"] = json.dumps(kept)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def refusal(data: bytes, path: Path) -> str:
    with pytest.raises(InvalidRequest) as caught:
        embedding_file.load(data, path)
    assert caught.value.reason == "EMBEDDING_FILE"
    return caught.value.message


@pytest.mark.parametrize("element_type", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_a_file_returns_what_was_written(
    tmp_path: Path, element_type: str, prompt: Prompt | None
) -> None:
    content = EmbeddingFile(embedding(element_type), prompt)
    path = tmp_path / "prompt.safetensors"
    embedding_file.write(path, content)
    assert embedding_file.read(path) == content
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_the_prompt_is_left_out_when_asked() -> None:
    assert rb"\"prompt" in embedding_file.dump(EmbeddingFile(embedding(), PROMPT))
    assert b"red circle" in embedding_file.dump(EmbeddingFile(embedding(), PROMPT))
    assert rb"\"prompt" not in embedding_file.dump(EmbeddingFile(embedding()))


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    embedding_file.write(path, EmbeddingFile(embedding(), PROMPT))
    tensor = load_file(path)["embeddings"]
    assert tensor.dtype == torch.bfloat16
    assert tensor.shape == (3, 5)
    assert tensor.view(torch.uint8).numpy().tobytes() == embedding().tensor.data


def test_a_file_with_a_sidecar_is_read(tmp_path: Path) -> None:
    values = torch.arange(10, dtype=torch.float32).reshape(2, 5)
    save_file({"embeddings": values}, tmp_path / "old.safetensors")
    sidecar = {"prompt": "a cat", "system_prompt": "draw", "encoder_device": "mps", "dtype": "x"}
    (tmp_path / "old.json").write_text(json.dumps(sidecar))
    content = embedding_file.read(tmp_path / "old.safetensors")
    assert content.prompt == Prompt("a cat", system="draw")
    assert content.embedding.identity == ""
    assert content.embedding.numerics.device == "mps"
    assert content.embedding.tensor.data == values.numpy().tobytes()


def test_a_bare_tensor_is_read(tmp_path: Path) -> None:
    save_file({"embeddings": torch.zeros(2, 5)}, tmp_path / "bare.safetensors")
    content = embedding_file.read(tmp_path / "bare.safetensors")
    assert content.prompt is None
    assert (content.embedding.identity, content.embedding.token_count) == ("", 2)


def test_both_sides_of_guidance_lie_in_one_file() -> None:
    negative = replace(embedding(), tensor=TensorData("float32", (1, 5), bytes(20)), token_count=1)
    content = EmbeddingFile(embedding(), PROMPT, negative, Prompt("blurry"))
    data = embedding_file.dump(content)
    assert embedding_file.load(data, Path("x")) == content
    assert set(load(data)) == {"embeddings", "negative_embeddings"}


def test_a_description_of_a_negative_that_is_not_there_is_refused() -> None:
    said = json.loads(json.dumps({"identity": "", "token_ids_sha256": "", "token_count": 1}))
    said |= {"recipe": {"chat_format": 1, "hidden_layer": -2, "token_limit": 1}}
    said |= {"numerics": dict.fromkeys(("compute_type", "weight_type"), "float32")}
    said["numerics"] |= {"engine": "", "device": ""}
    assert "negative" in refusal(altered(negative=said), Path("x.safetensors"))


def test_a_negative_beside_it_is_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "both.safetensors", torch.zeros(2, 5)
    save_file({"embeddings": rows, "negative_embeddings": rows + 1}, path)
    content = embedding_file.read(path)
    assert content.negative is not None
    assert content.negative.tensor.data == (rows + 1).numpy().tobytes()
    assert content.embedding.tensor.data == bytes(40)


def test_a_sidecar_that_is_no_json_is_named(tmp_path: Path) -> None:
    save_file({"embeddings": torch.zeros(2, 5)}, tmp_path / "old.safetensors")
    for content in ("{", "[" * 100_000, " " * (17 << 20)):
        (tmp_path / "old.json").write_text(content)
        with pytest.raises(InvalidRequest, match=r"old\.json"):
            embedding_file.read(tmp_path / "old.safetensors")


def test_a_file_of_ours_needs_no_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    embedding_file.write(path, EmbeddingFile(embedding()))
    (tmp_path / "prompt.json").write_text("something else, not JSON")
    assert embedding_file.read(path).embedding == embedding()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"\xff" * 64,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    assert "no safetensors file" in refusal(data, tmp_path / "x.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = embedding_file.dump(EmbeddingFile(embedding(), PROMPT))
    for length in range(len(whole)):
        refusal(whole[:length], tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no tensor 'embeddings' but nothing"),
        ({"weights": torch.zeros(2, 2)}, "but weights"),
        ({"embeddings": torch.zeros(2, 2), "mask": torch.zeros(2)}, "does not know its 'mask'"),
        ({"embeddings": torch.zeros(4)}, r"[4], not [tokens, width]"),
        ({"embeddings": torch.zeros(1, 2, 3)}, "[1, 2, 3]"),
        ({"embeddings": torch.zeros(0, 3)}, "[0, 3]"),
        ({"embeddings": torch.zeros(2, 3, dtype=torch.int8)}, "I8, not F32"),
    ],
)
def test_a_wrong_tensor_is_refused(
    tensors: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert said in refusal(path.read_bytes(), path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "this version reads format 1"),
        ({"identity": 5}, "identity"),
        ({"recipe": None}, "recipe"),
        ({"recipe": {"chat_format": "one", "hidden_layer": -2, "token_limit": 3}}, "chat_format"),
        ({"token_count": 4}, "4 rows and has 3"),
        ({"prompt": {"system": "no text"}}, "prompt.text"),
        (
            {
                "numerics": {
                    "compute_type": "int8",
                    "weight_type": "int8",
                    "engine": "",
                    "device": "",
                }
            },
            "element types",
        ),
    ],
)
def test_a_wrong_description_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(altered(**changes), tmp_path / "x.safetensors")


def test_a_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"embeddings": torch.zeros(2, 5)}, path, metadata={"zimage": "hello"})
    assert "its description is wrong" in refusal(path.read_bytes(), path)


def test_a_pickle_is_refused_with_lines_that_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = torch.rand(3, 5)
    torch.save({"embeddings": values}, "old.pt")
    with pytest.raises(InvalidRequest) as caught:
        embedding_file.read(Path("old.pt"))
    assert caught.value.reason == "EMBEDDING_PICKLED"
    exec("\n".join(line.strip() for line in caught.value.message.splitlines()[1:]))  # noqa: S102
    read = embedding_file.read(Path("old.safetensors"))
    assert read.embedding.tensor.data == values.numpy().tobytes()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        embedding_file.read(tmp_path / "nowhere.safetensors")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        embedding_file.read(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(InvalidRequest, match="larger than any embedding"):
        embedding_file.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(OSError, match="prompt"):
        embedding_file.write(path, EmbeddingFile(embedding()))
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_no_damage_makes_anything_but_a_typed_error(position: int, byte: int, cut: int) -> None:
    data = bytearray(embedding_file.dump(EmbeddingFile(embedding(), PROMPT)))
    data[position % len(data)] = byte
    with contextlib.suppress(ZImageError):
        embedding_file.load(bytes(data[: cut or None]), Path("x.safetensors"))


def test_equal_embeddings_make_equal_files() -> None:
    content = EmbeddingFile(embedding(), PROMPT)
    same = EmbeddingFile(replace(embedding()), replace(PROMPT))
    assert embedding_file.dump(content) == embedding_file.dump(same)
