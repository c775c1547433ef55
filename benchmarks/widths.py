"""Time against width: what kernels that work on blocks of channels make of a few channels less.

    python -m benchmarks.widths [--batch 128] [--threads 1] [--seconds 1] [--out FOLDER]

Residual blocks of a CIFAR ResNet (3x3 convolution to w channels, BatchNorm, ReLU, 3x3 convolution back) at 32x32x16, 16x16x32 and 8x8x64, times in turns with the
full width. Writes widths_cpu.json and a plot, relative time against relative width; the straight line is that of the MACs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _timing
from compress.files import write_json
from compress.latency import compare
from kernels.table import device_name

STAGES = ((16, 32), (32, 16), (64, 8))


class Block(nn.Module):
    """A residual block whose inner width is `width`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = (nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                                              nn.Conv2d(width, channels, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


def main() -> None:
    """Measure, store and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=_timing.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for channels, size in STAGES:
        step = channels // 16
        widths = [channels, *(w for edge in range(4 * step, channels + 1, 4 * step) for w in (edge - step, edge - 1 if step > 1 else edge, edge) if 0 < w < channels)]
        x = torch.randn(arguments.batch, channels, size, size, generator=torch.Generator().manual_seed(0))
        timed = compare({str(w): Block(channels, w).eval() for w in dict.fromkeys(widths)}, x, arguments.seconds, arguments.threads)
        for width, one in timed.items():
            rows.append({"channels": channels, "size": size, "width": int(width), "relative_time": 1 / one.speedup, "p10_p90": [1 / one.speedup_p90, 1 / one.speedup_p10],
                         "median_ms": one.latency.median_ms})
            print(rows[-1], flush=True)
    name = "widths_cpu"
    write_json(arguments.out / f"{name}.json", {"machine": device_name(torch.device("cpu")), "batch": arguments.batch, "threads": arguments.threads, "rows": rows})
    draw(rows, arguments.out / f"{name}.png", f"Residual block, batch {arguments.batch}, {arguments.threads} CPU thread(s)")


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Relative time against relative width, a curve per stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for channels, size in STAGES:
        points = sorted((row["width"], row["relative_time"]) for row in rows if row["channels"] == channels)
        axes.plot([width / channels for width, _ in points], [spent for _, spent in points], marker="o", markersize=3, label=f"{channels} channels, {size}x{size}")
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", label="MACs")
    axes.set(title=title, xlabel="inner width / full width", ylabel="time / time at full width", xlim=(0, 1.02), ylim=(0, None))
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
