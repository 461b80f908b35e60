"""The embedding file: a prompt encoded here, a picture made from it there.

A safetensors file with the tensor "embeddings" [tokens, width] and, for guidance, another one named
"negative_embeddings"; its header's key "zimage" says in JSON which encoder made them and how. Files
without that key are read as well, with whatever a JSON sidecar of the same stem knows of them; what
nobody knows is empty.
"""

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Embedding, Numerics, Prompt, Recipe
from zimage_core.errors import InvalidRequest, NotFound
from zimage_core.files import write_whole
from zimage_core.tensors import ELEMENT_BYTES, TensorData, byte_count

FORMAT = 1
"""The version of what stands under the header's key."""

_TENSOR = "embeddings"
_NEGATIVE = "negative_embeddings"
_KEY = "zimage"
_ELEMENT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HEADER_NAMES = {name: short for short, name in _ELEMENT_TYPES.items()}
_LARGEST_FILE_BYTES = 64 << 20  # twice both embeddings of 1504 tokens of 2560 in float32
_LARGEST_SIDECAR_BYTES = 16 << 20
_PICKLES = (b"PK\x03\x04", b"\x80")
_CONVERSION = """\
  import torch; from safetensors.torch import save_file; e = torch.load({old!r}, weights_only=True)
  save_file({{"embeddings": e["embeddings"] if isinstance(e, dict) else e}}, {new!r})"""


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """What a file holds; the texts, unless its maker left them out."""

    embedding: Embedding
    prompt: Prompt | None = None
    negative: Embedding | None = None
    negative_prompt: Prompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What is said of one of the tensors."""

    identity: str
    recipe: Recipe
    numerics: Numerics
    token_count: int
    token_ids_sha256: str
    prompt: Prompt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description(_Side):
    """What stands under the header's key: the positive side, and the other if there is one."""

    format: int
    negative: _Side | None = None


def write(path: Path, content: EmbeddingFile) -> None:
    """Writes the file, whole or not at all."""
    write_whole(path, dump(content))


def read(path: Path) -> EmbeddingFile:
    """Reads the file; raises NotFound, or InvalidRequest saying what is wrong with it."""
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise _broken(str(path), "it is larger than any embedding")
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"{path}: there is no such file", reason="FILE_NOT_FOUND", fields={"given": str(path)}
        ) from None
    except OSError as error:
        raise _broken(str(path), f"it cannot be read ({error.strerror})") from None
    return load(data, path)


def dump(content: EmbeddingFile) -> bytes:
    """The file's bytes.

    Written by hand, because the library's own raw writer takes memory addresses.
    """
    description = {"format": FORMAT, **_said(content.embedding, content.prompt)}
    tensors = {_TENSOR: content.embedding.tensor}
    if content.negative is not None:
        description["negative"] = _said(content.negative, content.negative_prompt)
        tensors[_NEGATIVE] = content.negative.tensor
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(description)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.data)
        header[name] = {
            "dtype": _HEADER_NAMES[tensor.element_type],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)  # so that the elements begin at a multiple of 8 bytes
    elements = b"".join(tensor.data for tensor in tensors.values())
    return struct.pack("<Q", len(written)) + written + elements


def _said(embedding: Embedding, prompt: Prompt | None) -> dict[str, Any]:
    side = _Side(
        identity=embedding.identity,
        recipe=embedding.recipe,
        numerics=embedding.numerics,
        token_count=embedding.token_count,
        token_ids_sha256=embedding.token_ids_sha256,
        prompt=prompt,
    )
    return {name: value for name, value in asdict(side).items() if value is not None}


def load(data: bytes, path: Path) -> EmbeddingFile:
    """The content of a file's bytes; beside `path` lies its sidecar, if it needs and has one."""
    name = str(path)
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        if data.startswith(_PICKLES):
            raise _pickled(path) from None
        raise _broken(name, f"it is no safetensors file, or not all of one ({error})") from None
    if _TENSOR not in tensors:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise _broken(name, f"it holds no tensor {_TENSOR!r} but {held}")
    if unknown := sorted(tensors.keys() - {_TENSOR, _NEGATIVE}):
        raise _broken(name, f"this version does not know its {', '.join(map(repr, unknown))}")
    tensor = _tensor(name, tensors[_TENSOR])
    negative = _tensor(name, tensors[_NEGATIVE]) if _NEGATIVE in tensors else None
    written = _metadata(data).get(_KEY)
    if written is None:
        return _foreign(tensor, negative, _sidecar(path))
    return _described(name, tensor, negative, written)


def _tensor(name: str, raw: dict[str, Any]) -> TensorData:
    shape = tuple(raw["shape"])
    element_type = _ELEMENT_TYPES.get(raw["dtype"])
    if element_type is None:
        raise _broken(name, f"its elements are {raw['dtype']}, not {', '.join(_ELEMENT_TYPES)}")
    if len(shape) != 2 or byte_count(element_type, shape) == 0:
        raise _broken(name, f"its shape is {list(shape)}, not [tokens, width]")
    return TensorData(element_type, shape, bytes(raw["data"]))


def _metadata(data: bytes) -> dict[str, str]:
    """The header's free part, of a file that the library has found sound."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    return header.get("__metadata__") or {}


def _described(
    name: str, tensor: TensorData, negative: TensorData | None, written: str
) -> EmbeddingFile:
    """A file of ours."""
    from pydantic import TypeAdapter, ValidationError  # slow to import, and seldom needed

    try:
        known = TypeAdapter(_Description).validate_json(written, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _broken(name, f"its description is wrong: {where}: {first['msg']}") from None
    if known.format != FORMAT:
        raise _broken(name, f"it has format {known.format}; this version reads format {FORMAT}")
    if (negative is None) != (known.negative is None):
        raise _broken(name, "its description and its tensors differ over a negative embedding")
    embedding = _embedding(name, tensor, known)
    if negative is None or known.negative is None:
        return EmbeddingFile(embedding, known.prompt)
    other = _embedding(name, negative, known.negative)
    return EmbeddingFile(embedding, known.prompt, other, known.negative.prompt)


def _embedding(name: str, tensor: TensorData, said: _Side) -> Embedding:
    rows = said.recipe.row_count(said.token_count)
    if rows != tensor.shape[0]:
        raise _broken(name, f"it speaks of {rows} rows and has {tensor.shape[0]}")
    if not {said.numerics.compute_type, said.numerics.weight_type} <= ELEMENT_BYTES.keys():
        raise _broken(name, f"its element types are not among {', '.join(ELEMENT_BYTES)}")
    return Embedding(
        tensor=tensor,
        identity=said.identity,
        recipe=said.recipe,
        numerics=said.numerics,
        token_count=said.token_count,
        token_ids_sha256=said.token_ids_sha256,
    )


def _foreign(
    tensor: TensorData, negative: TensorData | None, sidecar: dict[str, Any]
) -> EmbeddingFile:
    """Another program's file, with what its sidecar says; nobody knows which encoder made it."""

    def said(key: str) -> str:
        value = sidecar.get(key)
        return value if isinstance(value, str) else ""

    def embedding(tensor: TensorData) -> Embedding:
        return Embedding(
            tensor=tensor,
            identity="",
            recipe=Recipe(
                chat_format=0,
                hidden_layer=layer if type(layer) is int else DEFAULT_HIDDEN_LAYER,  # and no bool
                token_limit=0,
            ),
            numerics=Numerics(
                compute_type=tensor.element_type,
                weight_type=tensor.element_type,
                engine="",
                device=said("encoder_device"),
            ),
            token_count=tensor.shape[0],
            token_ids_sha256="",
        )

    layer = sidecar.get("hidden_layer")
    text = said("prompt")
    prompt = Prompt(text, system=said("system_prompt"), thinking=said("thinking_content"))
    return EmbeddingFile(
        embedding(tensor),
        prompt if text else None,
        None if negative is None else embedding(negative),
    )


def _sidecar(path: Path) -> dict[str, Any]:
    """What lies beside the file, empty when nothing does."""
    beside = path.with_suffix(".json")
    try:
        if beside.stat().st_size > _LARGEST_SIDECAR_BYTES:
            raise _broken(str(beside), "it is larger than any description")
        content = json.loads(beside.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(str(beside), f"it is no JSON ({error})") from None
    return content if isinstance(content, dict) else {}


def _broken(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} cannot be used as an embedding: {what}",
        reason="EMBEDDING_FILE",
        fields={"field": "embedding", "given": name, "cause": what},
    )


def _pickled(path: Path) -> InvalidRequest:
    lines = _CONVERSION.format(old=path.name, new=path.with_suffix(".safetensors").name)
    return InvalidRequest(
        f"{path} is a pickle, which can run code when it is opened; convert it where you trust it:"
        f"\n{lines}",
        reason="EMBEDDING_PICKLED",
        fields={"field": "embedding", "given": str(path)},
    )
