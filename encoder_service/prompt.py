"""A prompt's way to token ids: the chat format around its text, the tokenizer, and what is refused.

The format is that of Qwen3's chat template as diffusers' Z-Image pipeline uses it. Nothing is
trimmed or collapsed: the reference does not, and every space is a token.
"""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from zimage_core.embeddings import Prompt
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


def read_token_limit(model: Path) -> int:
    """The longest prompt that the DiT in the model folder takes; where none lies there, that of the
    published ones."""
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
    for index, prompt in enumerate(prompts):
        layer = prompt.effective_layer
        if shallowest <= layer <= deepest:
            continue
        remedy = (
            f"the encoder stops there; start it with --max-hidden-layer {layer} to go on"
            if deepest < layer < 0
            else f"{shallowest} is the token table, counted from the end"
        )
        allowed = f"{shallowest} to {deepest}"
        field = f"prompts[{index}].hidden_layer"
        raise InvalidRequest(
            f"{field}: {layer} given, {allowed} allowed ({remedy})",
            reason="HIDDEN_LAYER",
            fields={"field": field, "given": str(layer), "allowed": allowed},
        )


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

    def encode(self, prompts: Sequence[Prompt], token_limit: int) -> tuple[TokenIds, ...]:
        """The token ids of each prompt; raises InvalidRequest for one that is too long."""
        for index, prompt in enumerate(prompts):
            size = sum(len(part.encode()) for part in _parts(prompt).values())
            if size > PROMPT_BYTES:
                raise _too_long(index, prompt, size, PROMPT_BYTES, "bytes")
        encodings = self._tokenizer.encode_batch_fast([render(prompt) for prompt in prompts])
        token_ids = tuple(tuple(encoding.ids) for encoding in encodings)
        for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)):
            if len(ids) > token_limit:
                raise _too_long(index, prompt, len(ids), token_limit, "tokens")
        return token_ids


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
        f"{field}: {given} {unit} given, {allowed} allowed, the whole chat counted; shorten it",
        reason="TOKEN_LIMIT",
        fields={"field": field, "given": str(given), "allowed": str(allowed), "unit": unit},
    )
