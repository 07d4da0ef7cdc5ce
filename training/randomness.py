"""Every draw is a function of where it is made, so that an interrupted run repeats exactly."""

import hashlib

import torch


def generator(seed: int, *place: int | float | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place in a run, for example ``generator(seed, "noise", step, rank)``.

    Neighbouring places get unrelated streams (the seed is a hash of all of them), and the global
    generators of torch, numpy and Python are neither read nor changed.
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)
