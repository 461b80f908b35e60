"""Prompts and embeddings to and from their messages."""

from collections.abc import Iterable

from zimage_core.embeddings import (
    LONG_PROMPT_MODES,
    Blend,
    Embedding,
    Numerics,
    Prompt,
    Recipe,
)
from zimage_core.errors import InvalidRequest
from zimage_core.wire import names, tensors
from zimage_rpc.types.v1 import types_pb2

_TENSOR = "embeddings"
_NO_MODE = types_pb2.LONG_PROMPT_MODE_UNSPECIFIED


def prompt_to_wire(prompt: Prompt) -> types_pb2.Prompt:
    """The message of a prompt."""
    mode = prompt.long_prompt_mode
    if mode not in {None, *LONG_PROMPT_MODES}:
        allowed = ", ".join(LONG_PROMPT_MODES)
        raise ValueError(f"long_prompt_mode: {mode!r} given, {allowed} allowed")
    return types_pb2.Prompt(
        text=prompt.text,
        system=prompt.system,
        thinking=prompt.thinking,
        assistant=prompt.assistant,
        force_think_block=prompt.force_think_block,
        strip_quotes=prompt.strip_quotes,
        hidden_layer=prompt.hidden_layer,
        blend=_blend_to_wire(prompt.blend),
        token_limit=prompt.token_limit,
        long_prompt_mode=names.LONG_PROMPT_MODES[mode] if mode else _NO_MODE,
    )


def prompt_from_wire(message: types_pb2.Prompt, *, field: str) -> Prompt:
    """The prompt of a message; raises InvalidRequest for a blend that is none."""
    try:
        return _prompt(message)
    except ValueError as error:
        raise InvalidRequest(
            f"{field}.{error}", reason="BLEND", fields={"field": f"{field}.blend"}
        ) from None


def _prompt(message: types_pb2.Prompt) -> Prompt:
    return Prompt(
        text=message.text,
        system=message.system,
        thinking=message.thinking,
        assistant=message.assistant,
        force_think_block=message.force_think_block,
        strip_quotes=message.strip_quotes,
        hidden_layer=message.hidden_layer if message.HasField("hidden_layer") else None,
        blend=_blend_from_wire(message.blend),
        token_limit=message.token_limit if message.HasField("token_limit") else None,
        long_prompt_mode=names.name_of(message.long_prompt_mode, names.LONG_PROMPT_MODES) or None,
    )


def embedding_to_wire(embedding: Embedding, *, named: bool = False) -> types_pb2.PromptEmbedding:
    """The message of an embedding; of a named one it holds only the digest of the elements."""
    to_wire = tensors.named_to_wire if named else tensors.to_wire
    return types_pb2.PromptEmbedding(
        tensors={_TENSOR: to_wire(embedding.tensor)},
        identity=types_pb2.EncoderIdentity(sha256=embedding.identity),
        recipe=recipe_to_wire(embedding.recipe),
        numerics=numerics_to_wire(embedding.numerics),
        token_count=embedding.token_count,
        token_ids_sha256=embedding.token_ids_sha256,
    )


def named_digest(message: types_pb2.PromptEmbedding) -> types_pb2.Digest | None:
    """The name of the elements where the message does not hold them."""
    tensor = message.tensors.get(_TENSOR)
    return tensor.digest if tensor and tensor.HasField("digest") else None


def embedding_from_wire(
    message: types_pb2.PromptEmbedding, *, field: str, may_be_named: bool = False
) -> Embedding:
    """The embedding of a message; raises InvalidRequest unless it is one [rows, width] tensor.
    The elements of one that may be named can be missing still."""
    if set(message.tensors) != {_TENSOR}:
        raise _invalid(f"{field}.tensors", f"{sorted(message.tensors)}", f"exactly {_TENSOR!r}")
    from_wire = tensors.named_from_wire if may_be_named else tensors.from_wire
    tensor = from_wire(message.tensors[_TENSOR], field=f"{field}.tensors[{_TENSOR!r}]")
    try:
        recipe = recipe_from_wire(message.recipe)
    except ValueError as error:
        raise _invalid(f"{field}.recipe.blend", str(error), "a blend of weights") from None
    rows = recipe.row_count(message.token_count)
    if len(tensor.shape) != 2 or tensor.shape[0] != rows:
        raise _invalid(
            f"{field}.tensors[{_TENSOR!r}].shape",
            f"{list(tensor.shape)}",
            f"[{rows}, width], as token_count and the recipe say",
        )
    return Embedding(
        tensor=tensor,
        identity=message.identity.sha256,
        recipe=recipe,
        numerics=numerics_from_wire(message.numerics, field=f"{field}.numerics"),
        token_count=message.token_count,
        token_ids_sha256=message.token_ids_sha256,
    )


def recipe_to_wire(recipe: Recipe) -> types_pb2.EncodingRecipe:
    """The message of a recipe."""
    return types_pb2.EncodingRecipe(
        chat_format=recipe.chat_format,
        hidden_layer=recipe.hidden_layer,
        token_limit=recipe.token_limit,
        blend=_blend_to_wire(recipe.blend),
        long_prompt_mode=names.LONG_PROMPT_MODES.get(recipe.long_prompt_mode, _NO_MODE),
        row_limit=recipe.row_limit,
    )


def recipe_from_wire(message: types_pb2.EncodingRecipe) -> Recipe:
    """The recipe of a message."""
    return Recipe(
        chat_format=message.chat_format,
        hidden_layer=message.hidden_layer,
        token_limit=message.token_limit,
        blend=_blend_from_wire(message.blend),
        long_prompt_mode=names.name_of(message.long_prompt_mode, names.LONG_PROMPT_MODES),
        row_limit=message.row_limit,
    )


def numerics_to_wire(numerics: Numerics) -> types_pb2.Numerics:
    """The message of an arithmetic."""
    return types_pb2.Numerics(
        compute_type=tensors.element_type_to_wire(numerics.compute_type),
        weight_type=tensors.element_type_to_wire(numerics.weight_type),
        engine=numerics.engine,
        device=numerics.device,
        weights=numerics.weights,
    )


def numerics_from_wire(message: types_pb2.Numerics, *, field: str) -> Numerics:
    """The arithmetic of a message; raises InvalidRequest when a type is not known."""
    read = tensors.element_type_from_wire
    return Numerics(
        compute_type=read(message.compute_type, field=f"{field}.compute_type"),
        weight_type=read(message.weight_type, field=f"{field}.weight_type"),
        engine=message.engine,
        device=message.device,
        weights=message.weights or "full",
    )


def _blend_to_wire(blend: Blend) -> list[types_pb2.LayerWeight]:
    return [types_pb2.LayerWeight(hidden_layer=layer, weight=weight) for layer, weight in blend]


def _blend_from_wire(messages: Iterable[types_pb2.LayerWeight]) -> Blend:
    return tuple((message.hidden_layer, message.weight) for message in messages)


def _invalid(field: str, given: str, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {given} given, {allowed} allowed",
        reason="EMBEDDING",
        fields={"field": field, "given": given, "allowed": allowed},
    )
