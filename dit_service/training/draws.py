"""What chance decides in a training: each draw by what it is for, so that neither the order nor a
break changes any."""

import hashlib

import torch


def generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """One draw's own generator."""
    what = "/".join(map(str, (seed, purpose, *index)))
    number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number)
