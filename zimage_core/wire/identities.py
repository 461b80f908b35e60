"""Which encoder made an embedding: a digest of everything that decides its values.

It is a chain: each hidden state's identity covers the tokenizer, the numbers in the config that
decide the arithmetic, the token table and the layers up to that state. So an encoder that was
loaded deeper has the same identity at the same state, and checkpoints that differ in layers nobody
uses are no strangers. Tensors count by canonical name and value: shards, a "model." prefix or a
wider type that holds the same values change nothing.
"""

import hashlib
import json
import logging
import operator
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs

from zimage_core.errors import InvalidModel
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.formats.json_object import read_json_object
from zimage_core.formats.weight_digest import weight_digest
from zimage_core.formats.weights import Weight

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of the rules below; another version makes other identities."""


def encoder_identities(encoder: EncoderFiles, cache_folder: Path | None = None) -> dict[int, str]:
    """The identity of each hidden state of an encoder, from the token table to
    the deepest for which there are weights. States are counted from the end: -1 is after the final
    norm.

    The first call reads the encoder whole; later ones answer from the user's cache while the size
    and time of every file stay.
    """
    paths = [str(path.resolve()) for path in encoder.paths()]
    stamp = [_VERSION, [[path, *_size_and_time(Path(path))] for path in paths]]
    folder = cache_folder or platformdirs.user_cache_path("zimage") / "identities"
    entry = folder / f"{_sha256(paths)}.json"
    config = encoder.config()
    try:
        known = _remembered(entry, stamp)
        if not known:
            known = list(_chain(config, read_json_object(encoder.tokenizer), encoder.tensors()))
            _remember(entry, stamp, known)
        return dict(enumerate(known, -config["num_hidden_layers"] - 1))
    except (KeyError, TypeError) as error:
        what = f"the config here or the tokenizer beside lacks {error}"
        raise InvalidModel.at(encoder.weights, what) from error


def _chain(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], tensors: Mapping[str, Weight]
) -> Iterator[str]:
    """Each link covers the one before and the tensors between the two hidden states; a state
    without tensors ends it."""
    states: dict[int, dict[str, Weight]] = {}
    for name, weight in tensors.items():
        state = _first_state(name, config["num_hidden_layers"])
        if state is not None:
            states.setdefault(state, {})[name] = weight
    link = _sha256([_VERSION, _arithmetic(config), _token_rules(tokenizer)])
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for state in range(config["num_hidden_layers"] + 1):
            of_state = states.get(state)
            if not of_state:
                return
            digests = threads.map(weight_digest, of_state.values())
            link = _sha256([link, dict(zip(of_state, digests, strict=True))])
            yield link


def _first_state(name: str, layer_count: int) -> int | None:
    """The first hidden state that a tensor has a part in; None for one that has none."""
    match name.split("."):
        case ["embed_tokens", *_]:
            return 0
        case ["layers", layer, *rest] if layer.isdecimal() and rest[-1] != "inv_freq":  # derived
            return int(layer) + 1
        case ["norm", *_]:
            return layer_count  # the last hidden state is after the final norm
        case _:
            return None


def _arithmetic(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in the config that decide values and do not show in the tensors' shapes."""
    rope = config.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),  # as transformers 4 wrote it
    }
    heads = config["num_attention_heads"]
    return {
        "model_type": config["model_type"],
        "heads": heads,
        "key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "activation": config.get("hidden_act", "silu"),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": {
            key: float(value) if isinstance(value, int) else value for key, value in rope.items()
        },
    }


def _token_rules(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the ids of a text. Padding, truncation and decoding do not, and the versions of
    the library write the same rule in more than one way."""
    model = {key: value for key, value in tokenizer["model"].items() if value}
    merges = (
        pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", ())
    )
    added = sorted(tokenizer.get("added_tokens") or (), key=operator.itemgetter("id"))
    return {
        "model": {**model, "merges": list(merges)},
        "added_tokens": [{key: token[key] for key in token if key != "special"} for token in added],
        "normalizer": tokenizer.get("normalizer"),
        "pre_tokenizer": _without_offsets(tokenizer.get("pre_tokenizer")),
    }


def _without_offsets(rule: Any) -> Any:
    """Offsets say where in the text a token was, not which one it is."""
    if isinstance(rule, dict):
        return {key: _without_offsets(rule[key]) for key in rule if key != "trim_offsets"}
    return [_without_offsets(item) for item in rule] if isinstance(rule, list) else rule


def _remembered(entry: Path, stamp: object) -> list[str]:
    try:
        kept = json.loads(entry.read_bytes())
        if kept["files"] == stamp:
            return [str(identity) for identity in kept["identities"]]
    except (OSError, ValueError, TypeError, KeyError):
        _log.debug("no usable identities in %s", entry)
    return []


def _remember(entry: Path, stamp: object, identities: list[str]) -> None:
    """Keeps them for the next start, which takes longer where nothing can be written."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
            json.dump({"files": stamp, "identities": identities}, file)
        os.replace(file.name, entry)
    except OSError as error:
        _log.warning("cannot keep identities in %s: %s", entry, error)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidModel.at(path, f"cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
