"""A prompt's way to token ids: the chat format around its text, the tokenizer, and what is refused.

The format is that of Qwen3's chat template as diffusers' Z-Image pipeline uses it. Nothing is
trimmed or collapsed: the reference does not, and every space is a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from zimage_core.embeddings import CHAT_FORMAT, TRUNCATE, Prompt, Recipe
from zimage_core.errors import InvalidModel, InvalidRequest
from zimage_core.formats import published
from zimage_core.formats.json_object import read_json_object
from zimage_core.planning.limits import caption_token_limit
from zimage_core.wire.limits import PROMPT_BYTES

TokenIds = tuple[int, ...]


def render(prompt: Prompt) -> str:
    """The whole chat as the encoder reads it."""
    text = prompt.text.replace('"', "") if prompt.strip_quotes else prompt.text
    turns = [_turn("system", prompt.system)] if prompt.system else []
    return "\n".join([*turns, _turn("user", text), _answer(prompt)])


def read_row_limit(model: Path) -> int:
    """The longest caption that the DiT in the model folder takes; where none lies there, that of
    the published ones."""
    path = model / "transformer" / "config.json"
    if not path.is_file():
        return caption_token_limit(published.DIT_AXES_LENS)
    try:
        return caption_token_limit(read_json_object(path)["axes_lens"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = "no readable axes_lens, which decide how long a prompt may be"
        raise InvalidModel.at(path, what) from error


def check_hidden_layers(prompts: Sequence[Prompt], layer_count: int, deepest: int) -> None:
    """Raises InvalidRequest when a prompt wants a state that is not there or not computed."""
    shallowest = -(layer_count + 1)
    every = [
        (index, prompt, layer)
        for index, prompt in enumerate(prompts)
        for layer, _ in prompt.effective_blend
    ]
    for index, prompt, layer in every:
        if shallowest <= layer <= deepest:
            continue
        remedy = (
            f"the encoder stops there; start it with --max-hidden-layer {layer} to go on"
            if deepest < layer < 0
            else f"{shallowest} is the token table, counted from the end"
        )
        allowed = f"{shallowest} to {deepest}"
        field = f"prompts[{index}].{'blend' if prompt.blend else 'hidden_layer'}"
        raise InvalidRequest(
            f"{field}: {layer} given, {allowed} allowed ({remedy})",
            reason="HIDDEN_LAYER",
            fields={"field": field, "given": str(layer), "allowed": allowed},
        )


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """How long prompts and their embeddings may be."""

    tokens: int
    rows: int

    def recipe(self, prompt: Prompt) -> Recipe:
        """How it is encoded."""
        blend = prompt.effective_blend
        return Recipe(
            chat_format=CHAT_FORMAT,
            hidden_layer=prompt.effective_layer,
            token_limit=self.tokens if prompt.token_limit is None else prompt.token_limit,
            blend=blend if len(blend) > 1 else (),
            long_prompt_mode=prompt.effective_mode,
            row_limit=self.rows,
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises InvalidRequest when a prompt wants a limit that cannot be."""
        for index, prompt in enumerate(prompts):
            if prompt.token_limit is not None and not 1 <= prompt.token_limit <= self.tokens:
                allowed = f"1 to {self.tokens}"
                field = f"prompts[{index}].token_limit"
                raise InvalidRequest.given(field, prompt.token_limit, allowed, "TOKEN_LIMIT")


def is_too_long(token_ids: TokenIds, recipe: Recipe) -> bool:
    """Whether it can neither be taken as it is nor be cut."""
    return len(token_ids) > recipe.token_limit and recipe.long_prompt_mode != TRUNCATE


def to_run(index: int, prompt: Prompt, recipe: Recipe, token_ids: TokenIds) -> TokenIds:
    """The tokens that are encoded: cut where that is wanted, as nothing sees what comes later.
    Raises InvalidRequest for a text that is too long."""
    if is_too_long(token_ids, recipe):
        raise _too_long(index, prompt, len(token_ids), recipe.token_limit, "tokens")
    is_cut = recipe.long_prompt_mode == TRUNCATE
    return token_ids[: recipe.row_count(len(token_ids))] if is_cut else token_ids


class Tokenizer:
    """The model's own; a token's name typed in a prompt is that token, as it is in diffusers."""

    def __init__(self, path: Path) -> None:
        """`path` is a tokenizer.json."""
        if not path.is_file():
            what = "this file is missing; an encoder needs the tokenizer beside its weights"
            raise InvalidModel.at(path, what, "FILE_MISSING")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own
            raise InvalidModel.at(path, str(error)) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, prompts: Sequence[Prompt]) -> tuple[TokenIds, ...]:
        """The token ids of each prompt; raises InvalidRequest for one of too many bytes."""
        for index, prompt in enumerate(prompts):
            size = sum(len(part.encode()) for part in _parts(prompt).values())
            if size > PROMPT_BYTES:
                raise _too_long(index, prompt, size, PROMPT_BYTES, "bytes")
        encodings = self._tokenizer.encode_batch_fast([render(prompt) for prompt in prompts])
        return tuple(tuple(encoding.ids) for encoding in encodings)


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>"


def _answer(prompt: Prompt) -> str:
    """The assistant's turn: left open, as if the model went on, unless its text is given."""
    thought = ""
    if prompt.thinking or prompt.force_think_block:
        thought = f"<think>\n{prompt.thinking}\n</think>\n\n"
    if prompt.assistant:
        return _turn("assistant", thought + prompt.assistant)
    return f"<|im_start|>assistant\n{thought}"


def _parts(prompt: Prompt) -> dict[str, str]:
    names = ("text", "system", "thinking", "assistant")
    return {name: getattr(prompt, name) for name in names}


def _too_long(index: int, prompt: Prompt, given: int, allowed: int, unit: str) -> InvalidRequest:
    """Names the longest part: that is the one to shorten."""
    parts = _parts(prompt)
    field = f"prompts[{index}].{max(parts, key=lambda name: len(parts[name]))}"
    return InvalidRequest(
        f"{field}: {given} {unit} given, {allowed} allowed, the whole chat counted; shorten it"
        + (", or have it cut by long_prompt_mode truncate" if unit == "tokens" else ""),
        reason="TOKEN_LIMIT",
        fields={"field": field, "given": str(given), "allowed": str(allowed), "unit": unit},
    )
