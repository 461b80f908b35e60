"""`python -m demo_model.recipe`: makes the demo model, from nothing, in one run or in many.

Every stage leaves its result in the work folder and is skipped when that is there; a stage that was
killed goes on from its last checkpoint.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerFast

from demo_model.recipe import autoencoder, decoder, diffusion, latents, measures, tokenizer
from demo_model.recipe.assemble import assemble
from demo_model.recipe.autoencoder import AutoencoderTraining
from demo_model.recipe.decoder import DecoderTraining, Sampler
from demo_model.recipe.diffusion import DiffusionTraining
from demo_model.recipe.stages import Stage

_RESULT = Path(__file__).parents[1] / "zimage-demo"

_log = logging.getLogger("demo_model.recipe")


class Recipe:
    """The stages, in order; each asks for what it needs of those before."""

    def __init__(self, work: Path, device: torch.device) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work = work
        self._device = device

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Learnt from captions."""
        folder = self._work / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            tokenizer.build(folder)
        found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return found

    def autoencoder(self) -> Any:
        """The first autoencoder: its encoder is final."""
        folder = self._work / "autoencoder"
        stage = Stage("autoencoder", autoencoder.STEPS, self._work)
        if not (folder / "config.json").exists():
            training = AutoencoderTraining(self._device)
            stage.run(training)
            scratch = folder.with_suffix(".new")
            training.save(scratch)
            scratch.rename(folder)
        return AutoencoderKL.from_pretrained(folder).to(self._device)

    def networks(self) -> Any:
        """The transformer and the text encoder, averaged over their last steps."""
        encoder, words = self.autoencoder(), self.tokenizer()
        folder = self._work / "latents"
        latents.encode_all(folder, encoder, words, self._device)
        training = DiffusionTraining(latents.load(folder), words, self._device)
        Stage("diffusion", diffusion.STEPS, self._work).run(training)
        return training.averaged

    def run(self, result: Path) -> None:
        """All of it."""
        networks, model, words = self.networks(), self.autoencoder(), self.tokenizer()
        self._tell("autoencoder", model)
        sampler = Sampler(model, networks, words, self._device)
        sampled = sampler.batches(self._work / "sampled.pt")
        training = DecoderTraining(model, sampled, self._device)
        Stage("decoder", decoder.STEPS, self._work).run(training)
        self._tell("decoder", training.model)
        assemble(result, self._work / "assembled", training.model, networks, words)
        _log.info("the model is in %s", result)

    def _tell(self, name: str, model: Any) -> None:
        found = measures.reconstruction(model, self._device)
        _log.info(
            "%s: %.1f dB, worst %.1f, %.1f %% of scenes seen",
            name,
            found.psnr,
            found.worst_psnr,
            100 * found.passed,
        )


def main() -> int:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/demo-model"), help="checkpoints")
    parser.add_argument("--result", type=Path, default=_RESULT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(arguments.work / "log.txt")],
    )
    began = time.monotonic()
    Recipe(arguments.work, torch.device(arguments.device)).run(arguments.result)
    _log.info("%.0f minutes in this run", (time.monotonic() - began) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
