"""Compiled blocks over eager ones: a forward on a CPU, on the model and inputs of bench.dit.

python -m bench.compiled [--write]
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.dit import MIXED, SIZES, Inputs, Models
from bench.timing import compare, flags, machine, write_results
from demo_model.random_model import Shape, build
from dit_service.engine.compiling import compile_blocks
from dit_service.engine.heap import prepare_heap
from dit_service.model.loading import load_transformer

CASES = [(16, (30,)), (32, MIXED), (64, (120,))]
"""The side of the latents, and the prompt tokens of each sample."""


@torch.inference_mode()
def main() -> None:
    arguments = flags(__doc__).parse_args()
    prepare_heap()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder, Shape(transformer=SIZES))
        for dtype in (torch.float32, torch.bfloat16):
            models = Models(folder, dtype)
            compiled = load_transformer(folder, torch.device("cpu"), dtype)
            assert compile_blocks(compiled, "on", "sdpa").is_compiled
            for side, token_counts in CASES:
                inputs = Inputs.random(side, token_counts, dtype)
                step = models.samples(inputs), models.layout(inputs)
                timings = compare(
                    arguments.rounds,
                    floor=models.step_floor(inputs),
                    eager=partial(models.ours, *step),
                    compiled=partial(compiled, *step),
                )
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "latents": f"{side}x{side}",
                        "prompt_tokens": token_counts,
                        "compiled_over_eager": round(timings.ratio("compiled", "eager"), 3),
                        "eager_of_floor": round(timings.ratio("floor", "eager"), 3),
                        "compiled_of_floor": round(timings.ratio("floor", "compiled"), 3),
                    }
                )
                print(rows[-1], flush=True)
    if arguments.write:
        results = {"machine": machine("torch"), "threads": arguments.threads, "rows": rows}
        print(write_results("compiled", results))


if __name__ == "__main__":
    main()
