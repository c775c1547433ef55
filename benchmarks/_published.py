"""What the benchmarks on published CIFAR-10 ResNets share: command line, images, networks, and results that are kept row by row."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.config import DataConfig
from compress.data import DataBundle, load_data
from compress.files import write_json, write_text
from models import build, load_weights

NETWORKS = ("resnet20", "resnet32", "resnet56")
IMAGES, BATCH = 2048, 128
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RESULTS = Path(__file__).parent / "results"

Rows = list[dict[str, Any]]


def parser(description: str, threads: int | None = 1) -> argparse.ArgumentParser:
    """A command line with the folders of images and weights (`<network>_cifar10.safetensors`) and the CPU threads."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--data", required=True)
    found.add_argument("--weights", required=True)
    found.add_argument("--threads", type=int, default=threads)
    return found


def bundle(root: str, device: str | torch.device = "cpu") -> DataBundle:
    """CIFAR-10, normalised as the networks were trained; all training images."""
    return load_data(DataConfig(name="cifar10", root=root, mean=MEAN, std=STD, val_fraction=0.0), seed=0, device=torch.device(device))


def published(name: str, folder: str) -> nn.Module:
    """The trained network, in evaluation mode."""
    model = build(name, 10)
    load_weights(model, Path(folder) / f"{name}_cifar10.safetensors")
    return model.eval()


def known(rows: Rows, row: dict[str, Any]) -> bool:
    """Whether the results hold a row with these values already."""
    return any(all(old.get(key) == value for key, value in row.items()) for old in rows)


def keep(out: Path, measure: Callable[[Rows], Iterator[dict[str, Any]]], table: Callable[[Rows], str], device: str = "cpu") -> None:
    """Measure what `out` lacks, given the rows that it holds; each row is stored as it comes, with a table beside it, and printed."""
    stored = json.loads(out.read_text()) if out.exists() else {"rows": []}
    machine = torch.cuda.get_device_name() if device != "cpu" else platform.processor() or platform.machine()
    for row in measure(list(stored["rows"])):
        stored["rows"].append(row)
        stored |= {"machine": machine, "torch": torch.__version__, "calibration_images": IMAGES}
        write_json(out, stored)
        write_text(out.with_suffix(".md"), table(stored["rows"]))
        print(" ".join(f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()), flush=True)
