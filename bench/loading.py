"""How long loading takes, and how much memory it takes at its peak, each in a process of its own.

    python -m bench.loading [--write]

A random transformer of 0.9 GB in bfloat16, in one file of a folder, into a process that has its
libraries; files are in the page cache. Beside it diffusers' own loading.
"""

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.timing import flags, machine, write_results
from demo_model.random_model import Shape, build
from zimage_core.planning.memory import weight_bytes

SIZES = {
    "dim": 1536,
    "n_layers": 12,
    "n_refiner_layers": 2,
    "n_heads": 12,
    "n_kv_heads": 12,
    "cap_feat_dim": 128,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
WAYS = ("diffusers", "full", "int8", "fp8", "streamed")


def _loaded(way: str, folder: Path) -> object:
    if way == "diffusers":
        from diffusers import ZImageTransformer2DModel

        loader: Any = ZImageTransformer2DModel
        return loader.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    from dit_service.model.loading import Residence, load_transformer, read_config

    form, room = way, float("inf")
    if way == "streamed":
        config, _ = read_config(folder)
        form, room = "full", weight_bytes(config, 2).least
    device = torch.device("cpu")
    return load_transformer(folder, device, torch.bfloat16, Residence(form, room))


def _measured(way: str, folder: Path, answer: Any) -> None:
    from diffusers import ZImageTransformer2DModel  # noqa: F401

    import dit_service.model.loading  # noqa: F401 - both sides have their libraries before

    with torch.inference_mode():
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        began = time.perf_counter()
        model = _loaded(way, folder)
        seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    answer.send((seconds, peak - before, psutil.Process().memory_info().rss - before))
    del model


def main() -> None:
    arguments = flags(__doc__).parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder, Shape(transformer=SIZES))
        runs: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, taken in runs.items():
                here, there = context.Pipe()
                process = context.Process(target=_measured, args=(way, folder, there))
                process.start()
                there.close()  # or nobody would hear of a process that died
                taken.append(here.recv())
                process.join()
        for way, taken in runs.items():
            seconds, peak, lasting = (
                statistics.median(column) for column in zip(*taken, strict=True)
            )
            rows.append(
                {
                    "way": way,
                    "seconds": round(seconds, 2),
                    "peak_mb": round(peak / 1e6),
                    "lasting_mb": round(lasting / 1e6),
                }
            )
            print(rows[-1], flush=True)
    if arguments.write:
        print(write_results("loading", {"machine": machine("torch", "diffusers"), "rows": rows}))


if __name__ == "__main__":
    main()
