"""Whether torch's flags let float32 products on a GPU be rounded to TF32 (10 bits of mantissa, an error of about 3e-4).

torch has two sets of these flags and raises where both were used; the newer one is read then.
"""

from __future__ import annotations

import torch


def products_in_tf32() -> bool:
    """Matrix products: torch.set_float32_matmul_precision."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def convolutions_in_tf32() -> bool:
    """Convolutions of cuDNN: torch.backends.cudnn.allow_tf32, which is on by default."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
