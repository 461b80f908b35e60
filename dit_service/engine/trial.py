"""Small pictures, made to see what a transformer draws and how fast it is, not to be looked at."""

import statistics
import time

import torch

from dit_service.engine.diary import part
from dit_service.engine.packing import Asked, Conditioned, Packer
from dit_service.engine.precision import Trial
from dit_service.model.transformer import ZImageTransformer
from dit_service.model.vae import Vae
from dit_service.sampling.euler import text_to_image
from dit_service.sampling.forwards import POSITIVE, Run
from dit_service.sampling.noise import initial_noise
from zimage_core.planning import schedule

_SIDE_PX, _STEPS, _TOKENS = 256, 8, 64
_SEEDS = (0, 1, 2)
_RACE_SIDE_PX, _RACE_ROUNDS = 1024, 3
_CPU_RACE_SIDE_PX = 256


def try_out(model: ZImageTransformer, vae: Vae, backend: str, shift: float) -> Trial:
    """Draws by embeddings that say one thing over and over, as no encoder is here to make others:
    what they give is nearer to prompts' than what noise gives."""
    packer = Packer(model, backend)
    sigmas = schedule.sigmas(schedule.OFFICIAL, _STEPS, shift)
    latents, pictures, seconds = [], [], []
    for seed in _SEEDS:
        run, shared = _begun(model, sigmas, _SIDE_PX // vae.factor, seed)
        while run.step:
            run.send(tuple(packer.predict([_asked(shared, run)])))
        assert run.latents_CHW is not None
        latents.append(run.latents_CHW.cpu())
        pictures.append(vae.decode(run.latents_CHW)[0].cpu())
    race_px = _CPU_RACE_SIDE_PX if model.device.type == "cpu" else _RACE_SIDE_PX
    large, shared = _begun(model, sigmas, race_px // vae.factor, seed=0)
    for _ in range(1 + _RACE_ROUNDS):
        began = time.perf_counter()
        packer.predict([_asked(shared, large)])
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        seconds.append(time.perf_counter() - began)
    return Trial(tuple(latents), tuple(pictures), statistics.median(seconds[1:]))


def _begun(
    model: ZImageTransformer, sigmas: tuple[float, ...], side: int, seed: int
) -> tuple[Run, Conditioned]:
    generator = torch.Generator().manual_seed(seed)
    features_1F = torch.randn(1, model.config.cap_feat_dim, generator=generator)
    features_LF = features_1F.repeat(_TOKENS, 1)
    times = [1 - sigma for sigma in sigmas[:-1]]
    moments = model.modulate(torch.tensor(times, device=model.device))
    shared = Conditioned(
        captions={POSITIVE: model.encode_captions([features_LF.to(model.device)])[0]},
        modulations=dict(zip(times, moments, strict=True)),
    )
    noise_CHW = initial_noise(seed, (model.config.in_channels, side, side)).to(model.device)
    return Run(text_to_image(noise_CHW, sigmas, 0.0, 0.0, 1.0)), shared


def _asked(shared: Conditioned, run: Run) -> Asked:
    assert run.step is not None
    return Asked(part(), shared, run.step.forwards, len(run.step.forwards))
