"""Sums of outer products of a layer's input windows and output gradients. Tensors in, tensors out.

Symbols: x [b, c, h, w] layer input, T windows per image, a_t the window at position t [c / g, kh, kw] per group g, gradient [b, o, T].
    patches   sum_{n,t} a_t a_t^T                [g, d, d] with d = c / g kh kw
    channels  1/kk sum_{n,t,offset} a_t[:, offset] a_t[:, offset]^T      [g, c / g, c / g]
    pixels    T / (h w) sum_{n,p} x_p x_p^T      [g, c / g, c / g], every input pixel once
Products are taken in the input's type (float32 for half types) over chunks of bounded size, and summed in float64. Inside, windows are
ordered (kh, c, kw): at stride 1 two rows of a window differ by a shift of the image, so patches are unfolded along the width only and
kh products of rows, corrected at the borders, replace the kh^2 of a full unfold. `natural_order` gives the order (c, kh, kw) of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.curvature.geometry import Geometry

CHUNK_BYTES = 48 * 2**20
SUM_LENGTH = 2**15


def working(x: Tensor) -> Tensor:
    """The tensor detached, in float32 unless it is float64 already."""
    x = x.detach()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds x x^T to the upper triangle of total [g, d, d] for x [g, d, n]; `mirror` completes it.

    Pieces of n bound how many terms a product sums in low precision; for large d only blocks on and above the diagonal are multiplied.
    """
    d = x.shape[-2]
    step = d if d < 256 else -(-d // 4)
    for piece in x.split(SUM_LENGTH, -1):
        for start in range(0, d, step):
            total[..., start:start + step, start:] += piece[..., start:start + step, :] @ piece[..., start:, :].transpose(-1, -2)


def mirror(total: Tensor) -> Tensor:
    """`total` [..., d, d] with its upper triangle copied below the diagonal, in place."""
    d, step = total.shape[-1], 256
    for start in range(0, d, step):
        stop = min(start + step, d)
        corner = total[..., start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).transpose(-1, -2))
        total[..., stop:, start:stop] = total[..., start:stop, stop:].transpose(-1, -2)
    return total


def images_per_chunk(bytes_per_image: int) -> int:
    """How many images fit into a chunk."""
    return max(1, CHUNK_BYTES // max(1, bytes_per_image))


def flat(x: Tensor, groups: int) -> Tensor:
    """[b, c, ...] as [groups, c / groups, b n]."""
    b, c = x.shape[:2]
    return x.reshape(b, c, -1).transpose(0, 1).reshape(groups, c // groups, -1)


def add_rows(total: Tensor, sums: Tensor | None, x: Tensor, groups: int = 1) -> None:
    """Adds sum x x^T to total [g, d, d] (upper triangle) and sum x to sums [g, d], x [b, c, ...]: linear layers, 1x1 windows, gradients."""
    x = working(x)
    for chunk in x.split(images_per_chunk(x[0].numel() * x.element_size())):
        rows = flat(chunk, groups)
        add_gram(total, rows)
        if sums is not None:
            sums += rows.sum(-1, dtype=torch.float64)


def coverage(geometry: Geometry, axis: int, size: int, count: int) -> Tensor:
    """How many (window, offset) pairs read each row (axis 0) or column (axis 1) of the padded input, [size] float64."""
    starts = torch.arange(count)[:, None] * geometry.stride[axis]
    reads = (starts + torch.arange(geometry.kernel[axis]) * geometry.dilation[axis]).flatten()
    return torch.bincount(reads, minlength=size).double()


def add_channels(total: Tensor, x: Tensor, geometry: Geometry, pixels: bool = False) -> None:
    """Adds the channel sums of the module docstring to total [g, c / g, c / g] (upper triangle); x [b, c, h, w], not padded."""
    x = working(x)
    height, width = x.shape[2] + sum(geometry.padding[2:]), x.shape[3] + sum(geometry.padding[:2])
    rows, columns = geometry.positions((height, width))
    if pixels:
        scale = rows * columns / (x.shape[2] * x.shape[3])
        root = None
    else:
        scale = 1 / geometry.offsets
        weights = coverage(geometry, 0, height, rows)[:, None] * coverage(geometry, 1, width, columns)
        if geometry.padding_mode == "zeros":  # the padding adds nothing
            left, right, top, bottom = geometry.padding
            weights = weights[top:height - bottom, left:width - right]
        root = None if (weights == weights[0, 0]).all() else weights.sqrt().to(x)
        scale = scale * weights[0, 0].item() if root is None else scale
    product = torch.zeros_like(total)
    for chunk in x.split(images_per_chunk(2 * x[0].numel() * x.element_size())):
        if not pixels and geometry.padding_mode != "zeros":
            chunk = geometry.pad(chunk)
        add_gram(product, flat(chunk if root is None else chunk * root, geometry.groups))
    total.add_(product, alpha=scale)


def add_patches(total: Tensor, sums: Tensor, x: Tensor, geometry: Geometry) -> None:
    """Adds sum a a^T to total [g, d, d] (upper triangle) and sum a to sums [g, d], windows in the order (kh, c, kw); x as above."""
    x = working(x)
    height, width = x.shape[2] + sum(geometry.padding[2:]), x.shape[3] + sum(geometry.padding[:2])
    rows, columns = geometry.positions((height, width))
    shifted = geometry.stride[0] == 1 and geometry.kernel[0] > 1 and rows >= 2 * geometry.kernel[0] * geometry.dilation[0]
    size = geometry.channels * geometry.kernel[1] * columns * x.element_size()
    for chunk in x.split(images_per_chunk(size * (height if shifted else geometry.kernel[0] * rows))):
        if shifted:
            _add_shifted(total, sums, geometry.pad(chunk), geometry, rows, columns)
        else:
            patches = unfold(geometry.pad(chunk), geometry, rows, columns)
            add_gram(total, patches)
            sums += patches.sum(-1, dtype=torch.float64)


def unfold(padded: Tensor, geometry: Geometry, rows: int, columns: int) -> Tensor:
    """All windows [g, d, b T] of a padded input, d in the order (kh, c, kw), T in row-major order."""
    b, c = padded.shape[:2]
    (kh, kw), (sh, sw), (dh, dw), g = geometry.kernel, geometry.stride, geometry.dilation, geometry.groups
    channel_first = padded.transpose(0, 1).reshape(g, c // g, b, *padded.shape[2:])
    out = padded.new_empty(g, kh, c // g, kw, b, rows, columns)
    for i in range(kh):
        for j in range(kw):
            out[:, i, :, j] = channel_first[..., i * dh:i * dh + (rows - 1) * sh + 1:sh, j * dw:j * dw + (columns - 1) * sw + 1:sw]
    return out.reshape(g, geometry.window, -1)


def unfold_at(padded: Tensor, geometry: Geometry, row: Tensor, column: Tensor) -> Tensor:
    """The windows [g, d, b s] at s positions (row, column) of the output grid, d in the order (kh, c, kw)."""
    b, c = padded.shape[:2]
    kh, kw = geometry.kernel
    rows = row[:, None] * geometry.stride[0] + torch.arange(kh, device=row.device) * geometry.dilation[0]
    columns = column[:, None] * geometry.stride[1] + torch.arange(kw, device=row.device) * geometry.dilation[1]
    taken = padded[:, :, rows[:, :, None], columns[:, None, :]]  # [b, c, s, kh, kw]
    taken = taken.reshape(b, geometry.groups, c // geometry.groups, -1, kh, kw)
    return taken.permute(1, 4, 2, 5, 0, 3).reshape(geometry.groups, geometry.window, -1)


def _add_shifted(total: Tensor, sums: Tensor, padded: Tensor, geometry: Geometry, rows: int, columns: int) -> None:
    """`add_patches` at vertical stride 1. Rows r of the width-unfolded image U, window row i at output row y is U[y + i dh]."""
    b, c = padded.shape[:2]
    (kh, kw), dh, dw, sw, g = geometry.kernel, geometry.dilation[0], geometry.dilation[1], geometry.stride[1], geometry.groups
    height = padded.shape[2]
    source = padded.permute(1, 2, 0, 3).reshape(g, c // g, height, b, padded.shape[3])
    unfolded = padded.new_empty(g, c // g, kw, height, b, columns)
    for j in range(kw):
        unfolded[:, :, j] = source[..., j * dw:j * dw + (columns - 1) * sw + 1:sw]
    line = b * columns
    unfolded = unfolded.reshape(g, c // g * kw, height * line)
    blocks = total.view(g, kh, c // g * kw, kh, c // g * kw)
    blank = (geometry.padding[2], height - geometry.padding[3]) if geometry.padding_mode == "zeros" else (0, height)

    def product(start: int, stop: int, shift: int) -> Tensor | None:
        """Float64 sum over rows start <= r < stop of U[r] U[r + shift]^T, None where a padded zero row makes it zero."""
        start, stop = max(start, blank[0]), min(stop, blank[1] - shift)
        if start >= stop:
            return None
        result = None
        step = max(1, SUM_LENGTH // line)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = unfolded[..., first * line:last * line] @ unfolded[..., (first + shift) * line:(last + shift) * line].transpose(-1, -2)
            result = part.double() if result is None else result.add_(part)
        return result

    for step in range(kh):
        shift = step * dh
        running = product(0, rows, shift)
        for i in range(kh - step):
            if i:
                for sign, start in ((-1, (i - 1) * dh), (1, (i - 1) * dh + rows)):
                    edge = product(start, start + dh, shift)
                    if edge is not None:
                        running.add_(edge, alpha=sign)
            blocks[:, i, :, i + step] += running
    per_row = unfolded.reshape(g, c // g * kw, height, line).sum(-1, dtype=torch.float64)
    for i in range(kh):
        sums.view(g, kh, -1)[:, i] += per_row[..., i * dh:i * dh + rows].sum(-1)


def mean_patches(x: Tensor, geometry: Geometry) -> Tensor:
    """The average window of every image, [b, g, d] float64, d in the order (kh, c, kw); x [b, c, h, w], not padded."""
    padded = geometry.pad(working(x))
    rows, columns = geometry.positions(tuple(padded.shape[2:]))
    parts = []
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            top, left = i * geometry.dilation[0], j * geometry.dilation[1]
            window = padded[:, :, top:top + (rows - 1) * geometry.stride[0] + 1:geometry.stride[0],
                            left:left + (columns - 1) * geometry.stride[1] + 1:geometry.stride[1]]
            parts.append(window.mean((2, 3), dtype=torch.float64))
    stacked = torch.stack(parts, -1).reshape(x.shape[0], geometry.groups, -1, *geometry.kernel)
    return stacked.permute(0, 1, 3, 2, 4).reshape(x.shape[0], geometry.groups, geometry.window)


def natural_order(moment: Tensor, geometry: Geometry, dims: int) -> Tensor:
    """The last `dims` (1 or 2) dimensions of size d reordered from (kh, c, kw) to the order (c, kh, kw) of weights."""
    (kh, kw), c = geometry.kernel, geometry.channels // geometry.groups
    if kh == 1:
        return moment
    if dims == 1:
        return moment.unflatten(-1, (kh, c, kw)).transpose(-3, -2).flatten(-3)
    split = moment.unflatten(-1, (kh, c, kw)).unflatten(-4, (kh, c, kw))
    return split.transpose(-3, -2).transpose(-6, -5).flatten(-6, -4).flatten(-3)
