"""Where the time of a forward goes, operation by operation, at the size where C5 is missed.

python -m bench.dit_profile [--write]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.dit import SIZES, Inputs, Models
from bench.timing import RESULTS, machine
from demo_model.random_model import Shape, build
from dit_service.engine.heap import prepare_heap

LATENT_SIDE = 16
PROMPT_TOKENS = (30,)
STEPS = 20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="profiles a forward of one sample")
    parser.add_argument("--write", action="store_true", help="keep the table in bench/results")
    arguments = parser.parse_args()
    prepare_heap()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder, Shape(transformer=SIZES))
        models = Models(folder, torch.float32)
        step = models.step(Inputs.random(LATENT_SIDE, PROMPT_TOKENS, torch.float32))
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                step()
    table = profiled.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=36
    )
    text = f"{STEPS} steps of one sample, {machine('torch')}\n{table}\n"
    print(text)
    if arguments.write:
        (RESULTS / "dit_profile.txt").write_text(text)


if __name__ == "__main__":
    main()
