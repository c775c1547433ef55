"""What the kernel benchmarks share: the machine's description, guarded comparisons, tables, plots and result files."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._worker import failure_line
from kernels import precision, timing
from kernels.table import device_name

RESULTS = Path(__file__).parent / "results"
# Sums in float32, rounded once or twice at the end: one running sum of 28672 terms is 3e-6 off, rounding to 16 bits costs 2e-4 and 1.7e-3.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# cuDNN and oneDNN may take Winograd's algorithm for dense convolutions, whose transforms cost a digit or more; bfloat16 has none.
CONVOLUTION_TOLERANCE = TOLERANCE | {torch.float32: 1e-4, torch.float16: 5e-3}
# Rounding both factors to TF32 costs 3.4e-4, and 7.5e-4 where tensor cores cut the low bits off instead.
TF32_TOLERANCE = 1e-3
TF32_CONVOLUTION_TOLERANCE = 2e-3


def tolerance(y: Tensor) -> float:
    """Relative error up to which y counts as right: float32 on a GPU may be rounded to TF32 where torch's flags allow it, and images (four
    dimensions) may come from Winograd's algorithm."""
    rounded = y.is_cuda and (precision.products_in_tf32() or precision.convolutions_in_tf32())
    if y.dtype == torch.float32 and rounded:
        return TF32_CONVOLUTION_TOLERANCE if y.ndim == 4 else TF32_TOLERANCE
    return (CONVOLUTION_TOLERANCE if y.ndim == 4 else TOLERANCE)[y.dtype]


def fault(y: Tensor, expected: Tensor) -> str | None:
    """What is wrong with y, or None."""
    distance = error(y, expected)
    return None if distance <= tolerance(y) else f"wrong by {distance:.1e}"


def environment(device: torch.device) -> dict:
    """Machine, library versions and threads that a speed belongs to."""
    facts = {"device": device_name(device), "python": platform.python_version(), "torch": torch.__version__,
             "threads": torch.get_num_threads(), "system": platform.platform()}
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "copy_gb_s": copy_bandwidth(device)}
        facts |= {"tf32_matmul": precision.products_in_tf32(), "tf32_conv": precision.convolutions_in_tf32()}
        facts |= {"float32_tolerance": tolerance(torch.empty(0, device=device))}
    return facts


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """GB/s (read plus written) of copying 1 GiB on the GPU: what the share of bandwidth in the tables refers to."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.cuda.device(device):
        (taken,) = timing.on_cuda([[lambda: target.copy_(source)]], rounds=10)
    return 2 * source.numel() / taken.median / 1e3


def error(y: Tensor, expected: Tensor) -> float:
    """Relative Frobenius distance to the float64 result; infinite where y is not finite or has another shape."""
    if y.shape != expected.shape or not bool(torch.isfinite(y).all()):
        return math.inf
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def compare(alternatives: dict[str, Callable[[], Tensor]], expected: Tensor, seconds: float) -> dict[str, dict]:
    """CPU: {name: median, p10, p90 in us, ratio to "dense"} of the alternatives that are right; others {"wrong": error}."""
    return _judge(alternatives, expected, {}, lambda right: timing.on_cpu([alternatives[name] for name in right], seconds))


def compare_cuda(alternatives: dict[str, Sequence[Callable[[], Tensor]]], expected: Tensor,
                 others: dict[str, Tensor] | None = None) -> dict[str, dict]:
    """As `compare` on a GPU; each alternative is a list of the same call on copies of its weights. One that cannot be captured in a graph fails.

    `others` holds what alternatives with another weight should give.
    """
    first = {name: calls[0] for name, calls in alternatives.items()}
    graphs: dict[str, Any] = {}

    def capture(name: str) -> None:
        graphs[name] = timing.capture(alternatives[name])

    return _judge(first, expected, others or {}, lambda right: timing.replay([graphs[name] for name in right]), capture)


def _judge(calls: dict[str, Callable[[], Tensor]], expected: Tensor, others: dict[str, Tensor],
           measure: Callable[[list[str]], list[timing.Timing]], ready: Callable[[str], None] = lambda name: None) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    for name, call in calls.items():
        try:
            y = call()
            distance = error(y, others.get(name, expected))
            if not distance <= tolerance(y):
                rows[name] = {"wrong": distance}
            else:
                ready(name)
        except Exception as failure:
            # A rival may fail in any way (missing driver, unsupported shape); it must not end the run.
            rows[name] = {"failed": failure_line(failure)}
    right = [name for name in calls if name not in rows]
    if "dense" not in right:
        return rows
    try:
        taken = dict(zip(right, measure(right)))
    except Exception as failure:
        return rows | {name: {"failed": failure_line(failure)} for name in right}
    for name, t in taken.items():
        rows[name] = {"us": t.median, "p10": t.p10, "p90": t.p90, "runs": t.runs, "ratio": taken["dense"].median / t.median}
    return rows


def read(name: str, folder: Path = RESULTS) -> list[dict]:
    """The rows of earlier runs, each with the machine and versions that it belongs to; none where there is no file."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [{"machine": found["environment"]["device"], **row} for row in found["rows"]]


def of_machine(rows: list[dict], device: torch.device) -> list[dict]:
    """The rows that were measured on this machine with these versions."""
    return [row for row in rows if row.get("machine", device_name(device)) == device_name(device)]


def write(name: str, device: torch.device, rows: list[dict], folder: Path = RESULTS) -> Path:
    """<folder>/<name>.json with the environment and one object per case, and a table of this machine's rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    found = {"environment": environment(device), "rows": rows}
    _replace(path, json.dumps(found, indent=1) + "\n")
    here = of_machine(rows, device)
    if here and "times" in here[0]:
        _replace(path.with_suffix(".md"), table(found | {"rows": here}))
    return path


def _replace(path: Path, text: str) -> None:
    """Writes a file completely or not at all: a run may be cut at any moment."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def table(found: dict) -> str:
    """The ratios of a result file as a Markdown table: one line per case and side, one column per sparsity."""
    sparsities = sorted({row["sparsity"] for row in found["rows"]})
    facts = found["environment"]
    rounded = facts.get("float32_tolerance", 0) == TF32_TOLERANCE
    tf32 = f" TF32 is on, so float32 counts as right up to an error of {TF32_TOLERANCE:g} (convolutions {TF32_CONVOLUTION_TOLERANCE:g})." if rounded else ""
    cold = any("cache" in times for row in found["rows"] for times in row["times"].values())
    warm = (f" Weights come from memory except where a cell says warm (all copies fit into the second-level cache) or partly warm (they are less "
            f"than {timing.COLD} times as large): there a ratio compares caches as well as kernels." if cold else "")
    lines = [f"Dense time / sparse time, medians (10th to 90th percentile in the JSON file).{tf32}{warm} {facts['device']}", ""]
    lines += ["| case | form | " + " | ".join(f"{s:g}" for s in sparsities) + " |", "|---" * (2 + len(sparsities)) + "|"]
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in found["rows"]:
        case = f"{row['kind']} {row['name']}, N {row['columns']}" + (f", {row['pattern']}" if "pattern" in row else "")
        case += ", of an earlier version of the kernels" if row.get("outdated") else ""
        for side, times in row["times"].items():
            shown = "-" if "us" not in times else f"{times['us']:.0f} us" if side == "dense" else f"{times['ratio']:.2f}"
            shown += f" ({notes})" if (notes := remarks(times)) else ""
            cells.setdefault((case, side), {})[row["sparsity"]] = shown
    for (case, side), values in cells.items():
        lines.append(f"| {case} | {side} | " + " | ".join(values.get(s, "") for s in sparsities) + " |")
    return "\n".join(lines) + "\n"


def remarks(times: dict) -> str:
    """What belongs to a time: its settings, and that its weights did not come from memory."""
    found = [times.get("settings"), times["cache"] if times.get("cache", "cold") != "cold" else None]
    return "; ".join(remark for remark in found if remark) if "us" in times else ""


def line(label: str, result: dict[str, dict]) -> str:
    """One line of a table: the dense time, and each rival's ratio with its 10th to 90th percentile."""
    if "us" not in result.get("dense", {}):
        return f"{label}: dense failed ({result.get('dense', result)})"
    dense = result["dense"]["us"]
    notes = {name: f"; {remarks(row)}" if remarks(row) else "" for name, row in result.items()}
    parts = [f"{label}: dense {dense:.0f} us{notes['dense'].replace(';', ',')}"]
    for name, row in result.items():
        if "us" in row and name != "dense":
            parts.append(f"{name} {row['ratio']:.2f} ({dense / row['p90']:.2f}..{dense / row['p10']:.2f}{notes[name]})")
        elif "us" not in row:
            parts.append(f"{name} {'wrong' if 'wrong' in row else 'failed'}")
    return ", ".join(parts)


def plot(path: Path, title: str, curves: dict[str, list[tuple[float, float]]], bound: Callable[[float], float] | None = None) -> None:
    """Ratio to dense against sparsity, one curve per name, 1 marked and the byte bound dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.5, 4))
    colours = matplotlib.color_sequences["tab10"]
    for number, (name, points) in enumerate(curves.items()):
        ordered = sorted(points)
        # The second ten curves have the colours of the first.
        style = {"marker": "o", "linestyle": "-"} if number < len(colours) else {"marker": "s", "linestyle": ":"}
        axes.plot([p[0] for p in ordered], [p[1] for p in ordered], label=name, color=colours[number % len(colours)], markersize=4, **style)
    axes.axhline(1, color="black", linewidth=0.8)
    sparsities = sorted({p[0] for points in curves.values() for p in points})
    if bound is not None:
        axes.plot(sparsities, [bound(s) for s in sparsities], linestyle="--", color="black", linewidth=1, label="byte bound\n(weight only)")
    axes.set(title=title, xlabel="sparsity", ylabel="dense time / sparse time", yscale="log", xticks=sparsities)
    # A log axis labels powers of ten only, and most ratios lie between two of them.
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, axis="y", linewidth=0.3)
    # Curves start left and end right: a legend among them hides some.
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
