"""What a training step of the full-size model takes, on tensors without memory, and what of it is
due to what: diffusers' module with peft, whose samples come as a list, against ours.

    python -m bench.training_memory [--write]

Counted are the storages that live at once, weights included, in bfloat16; forwards and backwards
run as they would, with nothing in them.
"""

import contextlib
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import machine, write_results
from dit_service.training.flow import Noised
from dit_service.training.training import Example, Training
from tests.device.full_size import CONFIG, fake_transformer
from tests.device.test_memory import Peak
from zimage_core.planning.linears import block_counts, block_linears
from zimage_core.planning.training import LoraGroup, TrainingPlan

RANK = 16
SIDE = 128
SAME, MIXED = (128, 128, 128, 128), (128, 64, 32, 96)
LINEARS = tuple(block_linears(CONFIG))
STACKS = block_counts(CONFIG)
CPU = torch.device("cpu")  # autograd does not run on fake tensors of a device that is not there


def _module() -> Any:
    """Built without the mode: peft moves what it makes."""
    from diffusers import ZImageTransformer2DModel
    from peft import LoraConfig

    with unset_fake_temporarily(), torch.device("meta"):
        module: Any = ZImageTransformer2DModel(
            dim=CONFIG.dim, n_layers=CONFIG.n_layers, n_refiner_layers=CONFIG.n_refiner_layers,
            n_heads=CONFIG.n_heads, n_kv_heads=CONFIG.n_heads, cap_feat_dim=CONFIG.cap_feat_dim,
            axes_dims=list(CONFIG.axes_dims), axes_lens=list(CONFIG.axes_lens),
        )  # fmt: skip
        names = [
            f"{stack}.{n}.{linear}"
            for stack, count in STACKS.items()
            for n in range(count)
            for linear in LINEARS
        ]
        module.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
        return module


def theirs(
    *, recomputes: bool = True, refiners: bool = True, math: bool = False
) -> Callable[[tuple[int, ...]], None]:
    """A step of diffusers' module: blocks computed again or not, the refiners among them or not,
    attention by whole score matrices."""
    module = _module()
    if recomputes:
        module.enable_gradient_checkpointing()
        if not refiners:
            inside = set(module.layers)
            again = module._gradient_checkpointing_func

            def some(block: Any, *given: Any) -> Any:
                return again(block, *given) if block in inside else block(*given)

            module._gradient_checkpointing_func = some
    module.train()

    _fill(module)

    def step(lengths: tuple[int, ...]) -> None:
        latents = [torch.empty(16, 1, SIDE, SIDE, dtype=torch.bfloat16) for _ in lengths]
        features = [torch.empty(n, CONFIG.cap_feat_dim, dtype=torch.bfloat16) for n in lengths]
        times = torch.empty(len(lengths), dtype=torch.bfloat16)
        way = sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext()
        with way:
            out = module(latents, times, features, return_dict=False)[0]
            torch.stack([one.float().square().mean() for one in out]).sum().backward()

    return step


def _fill(module: Any) -> None:
    """Weights of no memory: frozen ones in bfloat16, those that learn in float32."""
    weights = {
        name: torch.empty(
            one.shape, dtype=torch.float32 if "lora" in name else torch.bfloat16, device=CPU
        )
        for name, one in module.state_dict().items()
    }
    module.load_state_dict(weights, assign=True)
    for name, one in module.named_parameters():
        one.requires_grad_("lora" in name)


def ours(recompute: str) -> Callable[[tuple[int, ...]], None]:
    """Our step, all samples at once."""
    groups = (LoraGroup(name, 0, count, LINEARS, RANK, RANK) for name, count in STACKS.items())
    plan = TrainingPlan(0, 10, tuple(groups), recompute=recompute)
    transformer = fake_transformer(CPU)

    def step(lengths: tuple[int, ...]) -> None:
        examples = [
            Example(
                torch.empty(16, SIDE, SIDE),
                torch.empty(n, CONFIG.cap_feat_dim, dtype=torch.bfloat16),
                1 / len(lengths),
            )
            for n in lengths
        ]
        noised = [
            Noised(torch.empty_like(one.latents_CHW), 0.5, torch.empty_like(one.latents_CHW))
            for one in examples
        ]
        Training(transformer, "sdpa", plan).go_back(noised, examples)

    return step


CASES: dict[str, Callable[[], Callable[[tuple[int, ...]], None]]] = {
    "diffusers: a list, every block computed again": theirs,
    "  the refiners kept": partial(theirs, refiners=False),
    "  attention by score matrices": partial(theirs, math=True),
    "  with nothing computed again": partial(theirs, recomputes=False),
    "ours: packed, every block computed again": partial(ours, "blocks"),
    "  nothing computed again": partial(ours, "nothing"),
}


def peak(case: Callable[[], Callable[[tuple[int, ...]], None]], lengths: tuple[int, ...]) -> float:
    """In GiB."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = case()
        with Peak() as taken:
            step(lengths)
    return round(float(taken.bytes) / 2**30, 1)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results")
    arguments = parser.parse_args()
    rows = []
    for name, case in CASES.items():
        one, four, mixed = (peak(case, lengths) for lengths in (SAME[:1], SAME, MIXED))
        rows.append({"case": name, "one": one, "four": four, "four_of_mixed_lengths": mixed})
        print(rows[-1], flush=True)
    if arguments.write:
        print(
            write_results(
                "training_memory", {"machine": machine("torch", "diffusers", "peft"), "gib": rows}
            )
        )


if __name__ == "__main__":
    main()
