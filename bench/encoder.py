"""C1: a 32-token prompt in bfloat16 on a CPU, against diffusers' `encode_prompt`. C3: a prompt that
begins like an earlier one, against the same from its first token on.

    python -m bench.encoder [--write]

The model has the shape of the released encoder and random weights that both sides share, 8 GB in
36 layers of distinct memory. Values do not matter to the time, so all layers are copies of one.
Both sides go from text to embedding; diffusers pads to 512 tokens and runs all layers, ours runs
the prompt's own tokens through the layers it needs.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import nn
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from bench.timing import compare, machine, write_results
from demo_model.random_model import byte_level_tokenizer
from encoder_service.engine.prefixes import Prefixes
from encoder_service.model.qwen import Qwen3Encoder, Text
from encoder_service.prompt import Tokenizer
from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Prompt

TARGET = 8.0
BEGINNING_TARGET = 4.0
BEGINNING_TOKENS = 208
"""A system prompt of 200 tokens and the chat's own before the user's."""
END_TOKENS = 24
USUAL = ((DEFAULT_HIDDEN_LAYER, 1.0),)
PROMPT = "a red circle!"
TOKEN_COUNT = 32
"""Of that prompt and the chat around it, with a tokenizer that knows bytes alone."""

QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}


def random_model(sizes: dict[str, Any]) -> Any:
    """In bfloat16, every layer in memory of its own."""
    config = Qwen3Config(**sizes)
    with torch.device("meta"):
        model: Any = Qwen3Model(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.rotary_emb = Qwen3RotaryEmbedding(config)
    torch.manual_seed(0)
    for parameter in (model.embed_tokens.weight, *model.layers[0].parameters()):
        nn.init.normal_(parameter, std=0.02)
    nn.init.ones_(model.norm.weight)
    for layer in model.layers[1:]:
        layer.load_state_dict(model.layers[0].state_dict())
    return model.requires_grad_(False).eval()


def _encoder(model: Any) -> Qwen3Encoder:
    """Ours, of the same weights in the same memory."""
    with torch.device("meta"):
        encoder = Qwen3Encoder(model.config, DEFAULT_HIDDEN_LAYER)
    needed = encoder.state_dict().keys()
    shared = {name: tensor for name, tensor in model.state_dict().items() if name in needed}
    encoder.load_state_dict(shared, assign=True)
    return encoder


def ours(model: Any, tokenizer: Tokenizer) -> Callable[[], Any]:
    encoder = _encoder(model)

    def encode() -> Any:
        [token_ids] = tokenizer.encode([Prompt(PROMPT)])
        [run] = encoder([Text(token_ids, USUAL)])
        return run.state

    return encode


def theirs(model: Any) -> Callable[[], Any]:
    pipeline: Any = ZImagePipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=model,
        tokenizer=byte_level_tokenizer(),
    )

    @torch.inference_mode()
    def encode() -> Any:
        [embedding], _ = pipeline.encode_prompt(
            [PROMPT], device=torch.device("cpu"), do_classifier_free_guidance=False
        )
        return embedding

    return encode


def measure_beginning(model: Any, rounds: int) -> dict[str, Any]:
    """Each time another end, behind the same system prompt; what is kept of it is in the time."""
    encoder = _encoder(model)
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 1000, (count,), generator=draw).tolist()

    beginning, prefixes = tokens(BEGINNING_TOKENS), Prefixes(1 << 30)

    def from_there() -> Any:
        text = prefixes.begun(Text([*beginning, *tokens(END_TOKENS)], USUAL))
        [run] = encoder([text])
        prefixes.keep(text, run)
        return run

    def from_the_first() -> Any:
        [run] = encoder([Text([*beginning, *tokens(END_TOKENS)], USUAL)])
        return run

    from_there()
    timings = compare(rounds, reused=from_there, whole=from_the_first)
    return {
        "what": f"C3: {END_TOKENS} tokens behind {BEGINNING_TOKENS} that ran before",
        "target": BEGINNING_TARGET,
        "ratio": round(timings.ratio("whole", "reused"), 2),
        "reused_seconds": round(timings.median("reused"), 3),
        "whole_seconds": round(timings.median("whole"), 3),
    }


def measure(model: Any, rounds: int) -> dict[str, Any]:
    layer_count = model.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as scratch:
        byte_level_tokenizer().save_pretrained(scratch)
        tokenizer = Tokenizer(Path(scratch) / "tokenizer.json")
        runs = {"ours": ours(model, tokenizer), "diffusers": theirs(model)}
    left, right = (run().float() for run in runs.values())
    timings = compare(rounds, **runs)
    return {
        "what": f"C1: {TOKEN_COUNT} tokens, Qwen3-4B shape, bfloat16, {layer_count} of 36 layers",
        "target": TARGET,
        "ratio": round(timings.ratio("diffusers", "ours"), 2),
        "ours_seconds": round(timings.median("ours"), 3),
        "diffusers_seconds": round(timings.median("diffusers"), 3),
        "largest_relative_difference": float((left - right).abs().max() / right.abs().max()),
        "every_round": {
            name: [round(seconds, 3) for seconds in each] for name, each in timings.seconds.items()
        },
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--layers", type=int, default=36, help="fewer where 8 GB are not free; ours runs one less"
    )
    arguments = parser.parse_args()
    model = random_model(QWEN3_4B | {"num_hidden_layers": arguments.layers})
    result = {
        **measure(model, arguments.rounds),
        "beginning": measure_beginning(model, arguments.rounds),
        "machine": machine("torch", "transformers", "diffusers"),
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.write:
        print(write_results("encoder", result))


if __name__ == "__main__":
    main()
