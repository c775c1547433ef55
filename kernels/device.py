"""What the kernels share: the fused epilogue and the ordered split-K reduction.

Imported only by the `triton.py` files, so that `import kernels` works where Triton is not installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in float32; ACTIVATION is one of epilogue.ACTIVATIONS."""
    if ACTIVATION == "relu":
        z = tl.where(z != z, z, tl.maximum(z, 0.0))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def finish(z, row, place, mask, scale, bias, residual, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
           ACTIVATION: tl.constexpr):
    """act(scale[row] * z + bias[row] + residual[place]); row and place broadcast against z (float32)."""
    if HAS_SCALE:
        z = z * tl.load(scale + row, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z = z + tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        z = z + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    return activate(z, ACTIVATION)


def shares(x: Tensor, splits: int, numbers: int, outputs: int) -> tuple[Tensor, Tensor]:
    """(float32 memory for the partial sums of `splits` programs, `numbers` each; one zero per group of programs that share outputs).

    The zeros are new on every call. Zeros kept from call to call and reset by the last program to arrive would save the kernel that writes them, but
    two kernels that run at the same time must not count on the same ones, and who runs when is not known here: recorded graphs may be replayed
    on any streams at once, wherever they were recorded. Memory kept per stream is not safe either where torch.compile records graphs: it takes what
    was allocated in its pool and is no output for free. Inside a graph, where launches cost least, the zeros are one small node.
    """
    if splits == 1:
        return x.new_empty(1, dtype=torch.float32), x.new_empty(1, dtype=torch.int32)
    return x.new_empty(splits * numbers, dtype=torch.float32), x.new_zeros(outputs, dtype=torch.int32)


@triton.jit
def arrive(counter, SPLITS: tl.constexpr):
    """Whether this program is the last of SPLITS to arrive; what the others stored before arriving is then visible to it.

    The barrier orders the stores of all threads of the program in front of the one thread that does the atomic.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
