"""The transformer's forward on a CPU against diffusers and against its bare matmuls and attention (C5, C6).

    python -m bench.dit [--write]

"step" is what a service pays per step; "whole" adds the caption and the modulation, which diffusers computes anew in
every forward.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from bench.timing import compare, machine, write_results
from dit_service.model.config import TransformerConfig
from dit_service.model.transformer import Sample, ZImageTransformer
from zimage_core.planning.limits import padded

SHAPE: dict[str, Any] = {
    "dim": 768,
    "n_layers": 6,
    "n_refiner_layers": 2,
    "n_heads": 12,
    "n_kv_heads": 12,
    "cap_feat_dim": 512,
    "axes_dims": [16, 24, 24],
    "axes_lens": [544, 128, 128],
}
SINGLE = [(16, 30), (32, 30), (64, 120), (96, 120)]
"""Latent side and prompt tokens of C5."""

MIXED = [(16, (20, 45, 90, 180)), (32, (20, 45, 90, 180)), (64, (20, 45, 90, 180))]
"""Latent side and prompt tokens of the four samples of C6."""


@dataclass(frozen=True)
class Inputs:
    latents: list[Tensor]
    times: Tensor
    features: list[Tensor]

    @classmethod
    def random(cls, side: int, token_counts: tuple[int, ...], dtype: torch.dtype) -> "Inputs":
        width = SHAPE["cap_feat_dim"]
        return cls(
            latents=[torch.randn(16, side, side) for _ in token_counts],
            times=torch.linspace(0.1, 0.7, len(token_counts)),
            features=[torch.randn(count, width, dtype=dtype) for count in token_counts],
        )

    def alone(self) -> list["Inputs"]:
        return [
            Inputs([latents], self.times[index : index + 1], [self.features[index]])
            for index, latents in enumerate(self.latents)
        ]


class Models:
    """Ours and diffusers' on the same weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.theirs = ZImageTransformer2DModel(**SHAPE).to(dtype).eval()
        self.ours = ZImageTransformer(TransformerConfig.from_values(dict(self.theirs.config)))
        self.ours.load_state_dict(self.theirs.state_dict())
        self.ours.to(dtype)

    def diffusers(self, inputs: Inputs) -> Callable[[], object]:
        latents = [x.unsqueeze(1).to(self.dtype) for x in inputs.latents]
        return lambda: self.theirs(latents, inputs.times, inputs.features, return_dict=False)

    def step(self, inputs: Inputs) -> Callable[[], object]:
        samples = self._samples(inputs)
        layout = self._layout(samples)
        return lambda: self.ours(samples, layout)

    def whole(self, inputs: Inputs) -> Callable[[], object]:
        layout = self._layout(self._samples(inputs))
        return lambda: self.ours(self._samples(inputs), layout)

    def _samples(self, inputs: Inputs) -> list[Sample]:
        captions = self.ours.encode_captions(inputs.features)
        modulations = self.ours.modulate(inputs.times)
        parts = zip(inputs.latents, captions, modulations, strict=True)
        return [Sample(latents, caption, modulation) for latents, caption, modulation in parts]

    def _layout(self, samples: list[Sample]) -> Any:
        return self.ours.layout([self.ours.shape_of(s.latents_CHW, s.caption) for s in samples])


class Floor:
    """The matmuls and attention calls of a forward, on tensors that are there already."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.calls: list[Callable[[], object]] = []

    @classmethod
    def step(cls, inputs: Inputs, dtype: torch.dtype) -> "Floor":
        floor = cls(dtype)
        dim, patch_dim = SHAPE["dim"], 64
        image = [padded(x[0].numel() // 4) for x in inputs.latents]
        joint = [rows + padded(len(c)) for rows, c in zip(image, inputs.features, strict=True)]
        floor.linear(sum(image), patch_dim, dim)
        floor.blocks(SHAPE["n_refiner_layers"], image)
        floor.blocks(SHAPE["n_layers"], joint)
        floor.linear(sum(image), dim, patch_dim)
        return floor

    @classmethod
    def whole(cls, inputs: Inputs, dtype: torch.dtype) -> "Floor":
        floor = cls.step(inputs, dtype)
        dim, moments = SHAPE["dim"], len(inputs.times)
        captions = [padded(len(features)) for features in inputs.features]
        floor.linear(sum(captions), SHAPE["cap_feat_dim"], dim)
        floor.blocks(SHAPE["n_refiner_layers"], captions)
        floor.linear(moments, 256, 1024)
        floor.linear(moments, 1024, 256)
        for _ in range(SHAPE["n_layers"] + SHAPE["n_refiner_layers"]):
            floor.linear(moments, 256, 4 * dim)
        floor.linear(moments, 256, dim)
        return floor

    def blocks(self, count: int, lengths: list[int]) -> None:
        dim, ffn_dim, rows = SHAPE["dim"], int(SHAPE["dim"] / 3 * 8), sum(lengths)
        for _ in range(count):
            for _ in range(3):
                self.linear(rows, dim, dim)
            for length in lengths:
                self.attention(length)
            self.linear(rows, dim, dim)
            self.linear(rows, dim, ffn_dim)
            self.linear(rows, dim, ffn_dim)
            self.linear(rows, ffn_dim, dim)

    def linear(self, rows: int, width: int, out_width: int) -> None:
        x = torch.randn(rows, width, dtype=self.dtype)
        weight = torch.randn(out_width, width, dtype=self.dtype)
        out = torch.empty(rows, out_width, dtype=self.dtype)
        self.calls.append(lambda: torch.mm(x, weight.t(), out=out))

    def attention(self, length: int) -> None:
        heads = SHAPE["n_heads"]
        q, k, v = torch.randn(
            3, 1, length, heads, SHAPE["dim"] // heads, dtype=self.dtype
        ).transpose(2, 3)
        self.calls.append(lambda: functional.scaled_dot_product_attention(q, k, v))

    def __call__(self) -> None:
        for call in self.calls:
            call()


def c5(models: Models, side: int, tokens: int, rounds: int) -> dict[str, Any]:
    inputs = Inputs.random(side, (tokens,), models.dtype)
    timings = compare(
        rounds,
        step_floor=Floor.step(inputs, models.dtype),
        step=models.step(inputs),
        whole_floor=Floor.whole(inputs, models.dtype),
        whole=models.whole(inputs),
        diffusers=models.diffusers(inputs),
    )
    return {
        "target": "C5",
        "dtype": str(models.dtype).removeprefix("torch."),
        "latents": f"{side}x{side}",
        "prompt_tokens": tokens,
        "step_of_floor": round(timings.ratio("step_floor", "step"), 3),
        "whole_of_floor": round(timings.ratio("whole_floor", "whole"), 3),
        "diffusers_of_floor": round(timings.ratio("whole_floor", "diffusers"), 3),
        "whole_over_diffusers": round(timings.ratio("diffusers", "whole"), 3),
        "step_over_diffusers": round(timings.ratio("diffusers", "step"), 3),
        "step_ms": round(timings.median("step") * 1e3, 1),
    }


def c6(models: Models, side: int, token_counts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    inputs = Inputs.random(side, token_counts, models.dtype)
    steps = [models.step(single) for single in inputs.alone()]
    floors = [Floor.step(single, models.dtype) for single in inputs.alone()]
    timings = compare(
        rounds,
        packed=models.step(inputs),
        packed_whole=models.whole(inputs),
        singles=lambda: [step() for step in steps],
        packed_floor=Floor.step(inputs, models.dtype),
        singles_floor=lambda: [floor() for floor in floors],
        diffusers_batch=models.diffusers(inputs),
    )
    return {
        "target": "C6",
        "dtype": str(models.dtype).removeprefix("torch."),
        "latents": f"4 of {side}x{side}",
        "prompt_tokens": list(token_counts),
        "packed_over_diffusers": round(timings.ratio("diffusers_batch", "packed"), 3),
        "packed_whole_over_diffusers": round(timings.ratio("diffusers_batch", "packed_whole"), 3),
        "packed_over_singles": round(timings.ratio("singles", "packed"), 3),
        "bare_packed_over_singles": round(timings.ratio("singles_floor", "packed_floor"), 3),
        "packed_of_floor": round(timings.ratio("packed_floor", "packed"), 3),
        "packed_ms": round(timings.median("packed") * 1e3, 1),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="keep the figures in bench/results/dit.json"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["C5", "C6"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype in arguments.dtypes:
        models = Models(getattr(torch, dtype))
        for benchmark, cases in ((c5, SINGLE), (c6, MIXED)):
            if arguments.only in (None, benchmark.__name__.upper()):
                for side, tokens in cases:
                    rows.append(benchmark(models, side, tokens, arguments.rounds))
                    print(rows[-1], flush=True)
    results = {"machine": machine("torch", "diffusers"), "threads": arguments.threads, "rows": rows}
    print(results["machine"])
    if arguments.write:
        print(write_results("dit", results))


if __name__ == "__main__":
    main()
