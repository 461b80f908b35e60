"""Decoding a picture: our VAE over diffusers' own call of the same one, at full size on a CPU.

    python -m bench.vae [--write]

The weights are random, of the published VAE's sizes.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from bench.timing import compare, flags, machine, write_results
from demo_model.random_model import Shape, build
from dit_service.model.loading import load_vae

SIZES = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
SIDES_PX = (128, 256)


@torch.inference_mode()
def main() -> None:
    arguments = flags(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder, Shape(vae=SIZES))
        for dtype in (torch.float32, torch.bfloat16):
            ours = load_vae(folder, torch.device("cpu"), dtype)
            theirs: Any = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).eval()
            for side_px in SIDES_PX:
                side = side_px // ours.factor
                latents_CHW = torch.randn(ours.latent_channels, side, side)
                batch = latents_CHW.unsqueeze(0).to(dtype)
                timings = compare(
                    arguments.rounds,
                    ours=partial(ours.decode, latents_CHW),
                    theirs=partial(theirs.decode, batch),
                )
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "side_px": side_px,
                        "diffusers_over_ours": round(timings.ratio("theirs", "ours"), 3),
                        "seconds": round(timings.median("ours"), 3),
                    }
                )
                print(rows[-1], flush=True)
    if arguments.write:
        results = {
            "machine": machine("torch", "diffusers"),
            "threads": arguments.threads,
            "rows": rows,
        }
        print(write_results("vae", results))


if __name__ == "__main__":
    main()
