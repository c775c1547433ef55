"""What enforcing masks costs in a training step: the same step with and without, in turns, on the machine at hand.

    python benchmarks/masks_cost.py [--models resnet20 resnet56 vgg16] [--batch-size 128] [--rounds 10]

A step is forward, backward and an SGD update with momentum on random images; masks keep 10 % of convolutions and linear layers. Rounds
alternate between both kinds of step; the cost is the median over the rounds of the ratio within a round, minus 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from compress.masks import Masks, prune
from compress.siblings import own

RESULTS = Path(__file__).parent / "results"


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A function that takes one training step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, optimizer


def seconds(step: Callable[[], None], device: torch.device, repeat: int) -> float:
    """Time of `repeat` steps, per step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def measure(name: str, batch_size: int, rounds: int, device: torch.device) -> dict:
    """Step times of one network with and without masks."""
    generator = torch.Generator().manual_seed(0)
    model = own("models").build(name, 10).to(device).train()
    x = torch.randn(batch_size, 3, 32, 32, generator=generator).to(device)
    y = torch.randint(10, (batch_size,), generator=generator).to(device)
    masks = Masks.attach(model, "conv+linear")
    prune(masks, "magnitude", 0.1)
    step, optimizer = stepper(model, x, y)
    repeat = 1 if device.type == "cpu" else 20

    def masked() -> None:
        step()
        masks.after_step(optimizer)

    seconds(masked, device, 2 * repeat)
    plain_times, masked_times, alone = [], [], []
    for _ in range(rounds):
        plain_times.append(seconds(step, device, repeat))
        masked_times.append(seconds(masked, device, repeat))
        alone.append(seconds(lambda: masks.after_step(optimizer), device, 5))
    ratios = [b / a - 1 for a, b in zip(plain_times, masked_times, strict=True)]
    return {
        "model": name,
        "batch_size": batch_size,
        "weights": masks.total,
        "plain_ms": 1e3 * statistics.median(plain_times),
        "masked_ms": 1e3 * statistics.median(masked_times),
        "masking_alone_ms": 1e3 * statistics.median(alone),
        "cost": statistics.median(ratios),
        "cost_range": [min(ratios), max(ratios)],
        "cost_from_masking_alone": statistics.median(alone) / statistics.median(plain_times),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56", "vgg16"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    )
    rows = [measure(name, args.batch_size, args.rounds, device) for name in args.models]
    args.output.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "torch": torch.__version__, "rows": rows}
    (args.output / f"masks_cost_{device.type}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
