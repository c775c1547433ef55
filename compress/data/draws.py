"""Independent random streams from one seed: a stream is named by keys, so that any of them can be made again at any time.

A training step is reproduced after an interruption by naming it, (seed, "step", epoch, step), instead of by restoring
generator states.
"""

from __future__ import annotations

import hashlib
import json

import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed: the head of SHA-256 of the JSON list [seed, *keys]."""
    digest = hashlib.sha256(json.dumps([seed, *keys]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derived_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for the stream `keys`; on the CPU so that the draws do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
