"""What adapters add to a forward on a CPU, each sample with its own: C9.

    python -m bench.adapters [--write]

The model is that of bench.dit; rank 16 on all linears of all blocks. Beside it peft's way with one
adapter for all samples: what diffusers computes with a LoRA that is loaded and not fused, over what
it computes without.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import save_file

from bench.dit import MIXED, SIZES, Inputs, Models, Run
from bench.timing import compare, flags, machine, write_results
from demo_model.random_model import Shape, build
from dit_service.engine.heap import prepare_heap
from dit_service.model.adapter_loading import load_adapter
from dit_service.model.adapters import Use, Uses
from zimage_core.planning.linears import linears

RANK = 16
CASES = [("float32", 32, MIXED), ("float32", 64, (120,)), ("bfloat16", 32, MIXED)]
"""Type, the side of the latents, and the prompt tokens of each sample."""


def _file(folder: Path, models: Models, number: int) -> Path:
    """Random, on the linears that trainers change."""
    tensors = {}
    for name, (out_width, width) in linears(models.ours.config).items():
        if ".attention." in name or ".feed_forward." in name:
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, width) / 100
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out_width, RANK) / 100
    path = folder / f"{number}.safetensors"
    save_file(tensors, path)
    return path


def _adapted(models: Models, inputs: Inputs, uses: list[Uses]) -> Run:
    """A step whose samples use these."""
    step = models.samples(inputs, uses), models.layout(inputs)
    return lambda: models.ours(*step)


def _measured(folder: Path, rounds: int, case: tuple[str, int, tuple[int, ...]]) -> dict[str, Any]:
    dtype, side, token_counts = case
    models = Models(folder / "model", getattr(torch, dtype))
    paths = [_file(folder, models, number) for number in range(len(token_counts))]
    cpu = torch.device("cpu")
    own: list[Uses] = [
        (Use(load_adapter(path, models.ours.config, cpu, models.dtype), 0.8),) for path in paths
    ]
    inputs = Inputs.random(side, token_counts, models.dtype)
    changed: Any = ZImageTransformer2DModel.from_pretrained(
        folder / "model" / "transformer", torch_dtype=models.dtype, low_cpu_mem_usage=False
    )
    ZImagePipeline.load_lora_into_transformer(
        *(ZImagePipeline.lora_state_dict(paths[0]), changed), adapter_name="one"
    )
    latents = [latents.unsqueeze(1).to(models.dtype) for latents in inputs.latents]
    timings = compare(
        rounds,
        none=models.step(inputs),
        mixed=_adapted(models, inputs, own),
        same=_adapted(models, inputs, own[:1] * len(own)),
        diffusers=models.diffusers(inputs),
        diffusers_peft=lambda: changed(latents, inputs.times, inputs.features, return_dict=False),
    )
    figures = {
        "mixed_over_none": timings.ratio("mixed", "none"),
        "same_over_none": timings.ratio("same", "none"),
        "peft_over_diffusers": timings.ratio("diffusers_peft", "diffusers"),
        "mixed_over_peft": timings.ratio("diffusers_peft", "mixed"),
        "none_seconds": timings.median("none"),
    }
    return {
        "dtype": dtype,
        "latents": f"{side}x{side}",
        "prompt_tokens": token_counts,
        **{name: round(figure, 3) for name, figure in figures.items()},
    }


@torch.inference_mode()
def main() -> None:
    arguments = flags(__doc__).parse_args()
    prepare_heap()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch) / "model", Shape(transformer=SIZES))
        for case in CASES:
            rows.append(_measured(Path(scratch), arguments.rounds, case))
            print(rows[-1], flush=True)
    results = {
        "machine": machine("torch", "diffusers", "peft"),
        "threads": arguments.threads,
        "rank": RANK,
        "rows": rows,
    }
    if arguments.write:
        print(write_results("adapters", results))


if __name__ == "__main__":
    main()
