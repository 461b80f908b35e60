"""The transformer's forward on a CPU against diffusers and against its own bare arithmetic: C5, C6.

    python -m bench.dit [--write]

The floor is the matmuls and attention calls of a forward on tensors that are there already. "step"
is what a service pays per step; "whole" adds the caption and the modulation, which diffusers
computes anew in every forward. Processes run with the heap that our worker sets up; --stock-heap
leaves it as the C library has it.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from bench.timing import compare, flags, machine, write_results
from demo_model.random_model import Shape, build
from dit_service.engine.heap import prepare_heap
from dit_service.model.adapters import Uses
from dit_service.model.layout import Layout
from dit_service.model.loading import load_transformer
from dit_service.model.transformer import Sample, ZImageTransformer
from zimage_core.planning.flops import TIME_FREQUENCIES, TIME_HIDDEN, DitShape
from zimage_core.planning.limits import padded

SIZES = {
    "dim": 768,
    "n_layers": 6,
    "n_refiner_layers": 2,
    "n_heads": 12,
    "n_kv_heads": 12,
    "cap_feat_dim": 512,
    "axes_dims": [16, 24, 24],
    "axes_lens": [544, 128, 128],
}
MIXED = (20, 45, 90, 180)
CASES = [
    ("C5", "float32", 16, (30,)),
    ("C5", "float32", 32, (30,)),
    ("C5", "float32", 64, (120,)),
    ("C6", "float32", 16, MIXED),
    ("C6", "float32", 32, MIXED),
    ("C6", "float32", 48, MIXED),
    ("C5", "bfloat16", 64, (120,)),
    ("C6", "bfloat16", 16, MIXED),
]
"""Target, type, the side of the latents, and the prompt tokens of each sample."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    latents: list[Tensor]
    times: Tensor
    features: list[Tensor]

    @classmethod
    def random(cls, side: int, token_counts: tuple[int, ...], dtype: torch.dtype) -> "Inputs":
        return cls(
            latents=[torch.randn(16, side, side) for _ in token_counts],
            times=torch.linspace(0.1, 0.7, len(token_counts)),
            features=[torch.randn(count, 512, dtype=dtype) for count in token_counts],
        )

    def alone(self) -> list["Inputs"]:
        return [
            Inputs([latents], time.unsqueeze(0), [features])
            for latents, time, features in zip(self.latents, self.times, self.features, strict=True)
        ]


class Models:
    """Ours and diffusers' on the same weights, each loaded its own way."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.ours: ZImageTransformer = load_transformer(folder, torch.device("cpu"), dtype)
        self.theirs: Any = ZImageTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype, low_cpu_mem_usage=False
        )

    def diffusers(self, inputs: Inputs) -> Run:
        latents = [latents.unsqueeze(1).to(self.dtype) for latents in inputs.latents]
        return lambda: self.theirs(latents, inputs.times, inputs.features, return_dict=False)

    def step(self, inputs: Inputs) -> Run:
        samples, layout = self.samples(inputs), self.layout(inputs)
        return lambda: self.ours(samples, layout)

    def whole(self, inputs: Inputs) -> Run:
        layout = self.layout(inputs)
        return lambda: self.ours(self.samples(inputs), layout)

    def step_floor(self, inputs: Inputs) -> "Floor":
        return Floor(self.ours.config, self.dtype).step(inputs)

    def whole_floor(self, inputs: Inputs) -> "Floor":
        return Floor(self.ours.config, self.dtype).step(inputs).preparation(inputs)

    def samples(self, inputs: Inputs, uses: Sequence[Uses] | None = None) -> list[Sample]:
        captions = self.ours.encode_captions(inputs.features)
        modulations = self.ours.modulate(inputs.times)
        uses = uses or [()] * len(captions)
        parts = zip(inputs.latents, captions, modulations, uses, strict=True)
        return [Sample(*part) for part in parts]

    def layout(self, inputs: Inputs) -> Layout:
        samples = self.samples(inputs)
        shapes = [self.ours.shape_of(sample.latents_CHW, sample.caption) for sample in samples]
        return self.ours.layout(shapes)


class Floor:
    """A list of bare calls, each on tensors of its own."""

    def __init__(self, shape: DitShape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.calls: list[Run] = []

    def __call__(self) -> None:
        for call in self.calls:
            call()

    def step(self, inputs: Inputs) -> "Floor":
        shape = self.shape
        images = [padded(latents[0].numel() // 4) for latents in inputs.latents]
        captions = [padded(len(features)) for features in inputs.features]
        joint = [image + caption for image, caption in zip(images, captions, strict=True)]
        self._linear(sum(images), shape.patch_dim, shape.dim)
        self._blocks(shape.n_refiner_layers, images)
        self._blocks(shape.n_layers, joint)
        self._linear(sum(images), shape.dim, shape.patch_dim)
        return self

    def preparation(self, inputs: Inputs) -> "Floor":
        shape, moments = self.shape, len(inputs.times)
        captions = [padded(len(features)) for features in inputs.features]
        self._linear(sum(captions), shape.cap_feat_dim, shape.dim)
        self._blocks(shape.n_refiner_layers, captions)
        self._linear(moments, TIME_FREQUENCIES, TIME_HIDDEN)
        self._linear(moments, TIME_HIDDEN, shape.time_dim)
        for _ in range(shape.n_layers + shape.n_refiner_layers):
            self._linear(moments, shape.time_dim, 4 * shape.dim)
        self._linear(moments, shape.time_dim, shape.dim)
        return self

    def _blocks(self, count: int, lengths: list[int]) -> None:
        dim, ffn_dim, rows = self.shape.dim, self.shape.ffn_dim, sum(lengths)
        for _ in range(count):
            for _ in range(3):
                self._linear(rows, dim, dim)
            for length in lengths:
                self._attention(length)
            self._linear(rows, dim, dim)
            self._linear(rows, dim, ffn_dim)
            self._linear(rows, dim, ffn_dim)
            self._linear(rows, ffn_dim, dim)

    def _linear(self, rows: int, width: int, out_width: int) -> None:
        x = torch.randn(rows, width, dtype=self.dtype)
        weight = torch.randn(out_width, width, dtype=self.dtype)
        out = torch.empty(rows, out_width, dtype=self.dtype)
        self.calls.append(lambda: torch.mm(x, weight.t(), out=out))

    def _attention(self, length: int) -> None:
        shape = (3, 1, length, self.shape.n_heads, self.shape.head_dim)
        q, k, v = torch.randn(shape, dtype=self.dtype).transpose(2, 3)
        self.calls.append(lambda: functional.scaled_dot_product_attention(q, k, v))


def c5(models: Models, inputs: Inputs, rounds: int) -> dict[str, float]:
    timings = compare(
        rounds,
        step_floor=models.step_floor(inputs),
        step=models.step(inputs),
        whole_floor=models.whole_floor(inputs),
        whole=models.whole(inputs),
        diffusers=models.diffusers(inputs),
    )
    return {
        "step_of_floor": timings.ratio("step_floor", "step"),
        "whole_of_floor": timings.ratio("whole_floor", "whole"),
        "diffusers_of_floor": timings.ratio("whole_floor", "diffusers"),
        "step_over_diffusers": timings.ratio("diffusers", "step"),
        "whole_over_diffusers": timings.ratio("diffusers", "whole"),
        "step_seconds": timings.median("step"),
    }


def c6(models: Models, inputs: Inputs, rounds: int) -> dict[str, float]:
    timings = compare(
        rounds,
        packed=models.step(inputs),
        packed_whole=models.whole(inputs),
        singles=_one_by_one([models.step(single) for single in inputs.alone()]),
        packed_floor=models.step_floor(inputs),
        singles_floor=_one_by_one([models.step_floor(single) for single in inputs.alone()]),
        diffusers_batch=models.diffusers(inputs),
    )
    return {
        "packed_over_diffusers": timings.ratio("diffusers_batch", "packed"),
        "packed_whole_over_diffusers": timings.ratio("diffusers_batch", "packed_whole"),
        "packed_over_singles": timings.ratio("singles", "packed"),
        "bare_packed_over_singles": timings.ratio("singles_floor", "packed_floor"),
        "packed_of_floor": timings.ratio("packed_floor", "packed"),
        "packed_seconds": timings.median("packed"),
    }


def _one_by_one(runs: list[Run]) -> Run:
    def run() -> None:
        for single in runs:
            single()

    return run


def _measured(folder: Path, only: str | None, rounds: int) -> Iterator[dict[str, Any]]:
    loaded = ""
    for target, dtype, side, token_counts in CASES:
        if only not in (None, target):
            continue
        if dtype != loaded:
            models, loaded = Models(folder, getattr(torch, dtype)), dtype
        inputs = Inputs.random(side, token_counts, models.dtype)
        figures = (c5 if target == "C5" else c6)(models, inputs, rounds)
        yield {
            "target": target,
            "dtype": dtype,
            "latents": f"{side}x{side}",
            "prompt_tokens": token_counts,
            **{name: round(figure, 3) for name, figure in figures.items()},
        }


@torch.inference_mode()
def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--only", choices=["C5", "C6"])
    parser.add_argument("--stock-heap", action="store_true")
    arguments = parser.parse_args()
    if not arguments.stock_heap:
        prepare_heap()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder, Shape(transformer=SIZES))
        rows = []
        for row in _measured(folder, arguments.only, arguments.rounds):
            print(row, flush=True)
            rows.append(row)
    results = {
        "machine": machine("torch", "diffusers"),
        "threads": arguments.threads,
        "heap": "stock" if arguments.stock_heap else "prepared",
        "rows": rows,
    }
    print(results["machine"])
    if arguments.write:
        print(write_results("dit", results))


if __name__ == "__main__":
    main()
