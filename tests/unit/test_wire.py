from dataclasses import replace

import pytest

from zimage_core.embeddings import Embedding, Numerics, Prompt, Recipe
from zimage_core.errors import InvalidRequest
from zimage_core.tensors import TensorData
from zimage_core.wire import embeddings, request_id, strict, tensors
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

EMBEDDING = Embedding(
    tensor=TensorData("bfloat16", (2, 3), bytes(range(12))),
    identity="ab" * 32,
    recipe=Recipe(chat_format=1, hidden_layer=-2, token_limit=512),
    numerics=Numerics("bfloat16", "bfloat16", "transformers 5", "cpu"),
    token_count=2,
    token_ids_sha256="cd" * 32,
)
UNKNOWN = b"\xf8\x3f\x01"  # field 1023, varint 1


@pytest.mark.parametrize(
    "tensor",
    [
        TensorData("float32", (1, 2), bytes(8)),
        TensorData("float16", (0, 5), b""),
        TensorData("bfloat16", (), bytes(2)),
    ],
)
def test_tensors_come_back(tensor: TensorData) -> None:
    assert tensors.from_wire(tensors.to_wire(tensor), field="x") == tensor


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (types_pb2.Tensor(shape=[1], data=bytes(4)), "ELEMENT_TYPE"),
        (types_pb2.Tensor(element_type=1, shape=[2], data=bytes(4)), "TENSOR_LENGTH"),
        (types_pb2.Tensor(element_type=1, shape=[-1, -1], data=bytes(4)), "TENSOR_SHAPE"),
        (types_pb2.Tensor(element_type=1, shape=[2**62, 2**62], data=bytes(4)), "TENSOR_SHAPE"),
        (types_pb2.Tensor(element_type=1, shape=[2] * 40_000), "TENSOR_SHAPE"),
    ],
)
def test_tensors_that_do_not_add_up_are_refused(message: types_pb2.Tensor, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        tensors.from_wire(message, field="here")
    assert refusal.value.reason == reason
    assert refusal.value.field.startswith("here")


def test_embeddings_come_back() -> None:
    message = embeddings.embedding_to_wire(EMBEDDING)
    assert embeddings.embedding_from_wire(message, field="x") == EMBEDDING


def test_prompts_come_back() -> None:
    blend = ((-2, 0.5), (-9, 3.0))
    prompt = Prompt("a", "b", "c", "d", True, True, -5, blend, 99, "pool")
    assert embeddings.prompt_from_wire(embeddings.prompt_to_wire(prompt), field="x") == prompt
    unset = embeddings.prompt_from_wire(types_pb2.Prompt(text="a"), field="x")
    assert unset == Prompt("a")
    assert unset.effective_layer == -2


def test_a_blend_that_is_none_is_refused() -> None:
    message = types_pb2.Prompt(blend=[types_pb2.LayerWeight(hidden_layer=-2)])
    with pytest.raises(InvalidRequest, match=r"here\.blend: the weights \[0\.0\]") as refusal:
        embeddings.prompt_from_wire(message, field="here")
    assert refusal.value.field == "here.blend"


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="long_prompt_mode: 'shrink' given, interpolate, pool"):
        embeddings.prompt_to_wire(Prompt("a", long_prompt_mode="shrink"))


@pytest.mark.parametrize(
    ("mode", "token_count", "rows"),
    [("interpolate", 9, 9), ("pool", 900, 30), ("truncate", 900, 20), ("truncate", 5, 5)],
)
def test_an_embedding_has_as_many_rows_as_its_recipe_says(
    mode: str, token_count: int, rows: int
) -> None:
    recipe = Recipe(1, -2, token_limit=20, long_prompt_mode=mode, row_limit=30)
    tensor = TensorData("float32", (rows, 1), bytes(4 * rows))
    long = replace(EMBEDDING, tensor=tensor, recipe=recipe, token_count=token_count)
    message = embeddings.embedding_to_wire(long)
    assert embeddings.embedding_from_wire(message, field="x") == long
    message.token_count = rows - 1
    with pytest.raises(InvalidRequest):
        embeddings.embedding_from_wire(message, field="x")


@pytest.mark.parametrize("change", ["tensor name", "token count", "rank"])
def test_embeddings_that_do_not_add_up_are_refused(change: str) -> None:
    message = embeddings.embedding_to_wire(EMBEDDING)
    if change == "tensor name":
        message.tensors["other"].CopyFrom(message.tensors["embeddings"])
    elif change == "token count":
        message.token_count = 3
    else:
        del message.tensors["embeddings"].shape[:]
        message.tensors["embeddings"].shape.extend([2, 3, 1])
    with pytest.raises(InvalidRequest):
        embeddings.embedding_from_wire(message, field="x")


def _spec() -> dit_pb2.GenerateSpec:
    spec = dit_pb2.GenerateSpec(width_px=64)
    segment = spec.positive.segments.add()
    segment.embedding.CopyFrom(embeddings.embedding_to_wire(EMBEDDING))
    return spec


def test_what_is_known_passes() -> None:
    strict.refuse_unknown(_spec())


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ([], "GenerateSpec"),
        (["positive"], "GenerateSpec.positive"),
        (["positive", "segments", 0, "embedding"], "segments[0].embedding"),
        (
            ["positive", "segments", 0, "embedding", "tensors", "embeddings"],
            "tensors['embeddings']",
        ),
    ],
)
def test_unknown_fields_are_refused_at_any_depth(path: list[str | int], names: str) -> None:
    spec = _spec()
    message = spec
    for step in path:
        message = getattr(message, step) if _is_field(message, step) else message[step]
    message.MergeFromString(UNKNOWN)
    with pytest.raises(InvalidRequest, match="1023") as refusal:
        strict.refuse_unknown(spec)
    assert refusal.value.reason == "UNKNOWN_FIELD"
    assert names in refusal.value.field


def _is_field(message: object, step: str | int) -> bool:
    return isinstance(step, str) and hasattr(message, "DESCRIPTOR")


def test_unknown_enum_values_are_refused() -> None:
    spec = _spec()
    spec.output.format = 99  # type: ignore[assignment]
    with pytest.raises(InvalidRequest, match=r"GenerateSpec\.output\.format: enum value 99"):
        strict.refuse_unknown(spec)


@pytest.mark.parametrize("given", ["", "x" * 129, "line\nbreak", "\u00e9"])
def test_request_ids_unfit_for_a_log_line_are_replaced(given: str) -> None:
    assert request_id.accept(given) != given


def test_fit_request_ids_are_kept() -> None:
    assert request_id.accept("abc-123") == "abc-123"
