"""Latency of whole masked networks before and after `sparsify`: the curve of time against sparsity that masks alone leave flat.

    python -m benchmarks.sparse_model [--device cuda] [--cases cifar imagenet] [--batches 1 128] [--models vgg16 resnet50] [--retry]
        [--out FOLDER]

Every convolution and linear layer except the first is masked to the same sparsity (random weights: the time does not depend on their
values, only on where zeros are; smallest magnitudes are removed). Both networks are timed in turns in one process. On a GPU the weights are
bfloat16 and channels_last, and cuDNN searches for its fastest algorithms. The sparse network's error against float64 may be twice the dense
one's. Writes sparse_model_<device>.json after every row and a plot per case at the end; rows that the file holds of the same machine and
versions, those of this project's kernels included, are not measured again (failed ones are with `--retry`), others are replaced.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

from benchmarks import _timing
from benchmarks._worker import Worker, guarded
from compress.siblings import own
from kernels import measure as measuring
from kernels import sparsify, timing
from kernels.table import device_name
from kernels.version import version

CASE_SECONDS = 3600.0
FACTS = ("model", "case", "batch", "sparsity")
SLACK = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}  # for networks whose dense error is next to nothing
CHECKED = 8  # images whose outputs are compared with float64
SPARSITIES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
CASES = {"cifar": (10, 32, {"vgg16": "vgg16", "resnet50": "torchvision/resnet50"}),
         "imagenet": (1000, 224, {"vgg16": "torchvision/vgg16", "resnet50": "torchvision/resnet50"})}


def masked_network(name: str, classes: int, sparsity: float) -> nn.Module:
    """The network with that fraction of each layer's weights set to zero, the first layer left dense."""
    torch.manual_seed(0)
    model = own("models").build(name, classes).eval()
    layers = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)][1:]
    with torch.no_grad():
        for layer in layers:
            flat = layer.weight.abs().flatten()
            count = int(sparsity * flat.numel())
            if count:
                layer.weight.mul_((flat > flat.kthvalue(count).values).view_as(layer.weight))
    return model


def measure(name: str, classes: int, size: int, sparsity: float, batch: int, device: torch.device, seconds: float) -> dict:
    """Milliseconds before and after `sparsify`, which layers were replaced by what."""
    model = masked_network(name, classes, sparsity).to(device)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    if device.type == "cuda":
        model, x = model.to(torch.bfloat16, memory_format=torch.channels_last), x.to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.cuda.device_of(x), torch.no_grad():
        sparse, report = sparsify(model, x, seconds=seconds)
        expected = copy.deepcopy(model).double()(x[:CHECKED].double())
        errors = [_timing.error(network(x)[:CHECKED], expected) for network in (model, sparse)]
        if not errors[1] <= 2 * errors[0] + SLACK[x.dtype]:
            return {"wrong": errors[1], "dense_error": errors[0]}
        if x.is_cuda:
            before, after = timing.on_cuda([[lambda: model(x)], [lambda: sparse(x)]], launches=measuring.NETWORK_LAUNCHES)
        else:
            before, after = timing.on_cpu([lambda: model(x), lambda: sparse(x)], max(3.0, 10 * seconds), rounds=3)
    forms: dict[str, int] = {}
    for choice in report.choices:
        forms[choice.choice] = forms.get(choice.choice, 0) + 1
    return {"before_ms": before.median / 1e3, "before_p10_p90": [before.p10 / 1e3, before.p90 / 1e3], "after_ms": after.median / 1e3,
            "after_p10_p90": [after.p10 / 1e3, after.p90 / 1e3], "ratio": before.median / after.median, "layers": forms,
            "errors": errors, "note": report.note}


def measure_job(job: dict) -> dict:
    """`measure` with its arguments as a dictionary that can be sent to another process."""
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(job["threads"])
    given = (job[key] for key in ("network", "classes", "size", "sparsity", "batch"))
    return measure(*given, torch.device(job["device"]), job["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--seconds", type=float, default=0.3, help="time for measuring one layer")
    parser.add_argument("--retry", action="store_true", help="measure rows again that failed before")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_timing.RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    # On a GPU one broken network must not take the others with it.
    worker = Worker(measure_job, CASE_SECONDS) if device.type == "cuda" else None
    name = f"sparse_model_{device.type}"
    rows = [row for row in _timing.read(name, options.out) if not (options.retry and "failed" in row)]
    # What a network becomes depends on the whole package: on its kernels and on what chooses among them.
    kernels = version()
    known = {tuple(row[key] for key in FACTS) for row in _timing.of_machine(rows, device) if row.get("kernels") == kernels}
    for case in options.cases:
        classes, size, names = CASES[case]
        for model in options.models:
            for batch in options.batches:
                for sparsity in options.sparsities:
                    if (model, case, batch, sparsity) in known:
                        continue
                    facts = {"machine": device_name(device), "model": model, "case": case, "batch": batch, "sparsity": sparsity}
                    job = {"network": names[model], "classes": classes, "size": size, "sparsity": sparsity, "batch": batch,
                           "device": options.device, "seconds": options.seconds, "threads": options.threads}
                    row = facts | {"kernels": kernels} | (worker.run(job) if worker is not None else guarded(measure_job, job))
                    rows = [r for r in rows if any(r.get(key) != value for key, value in facts.items())] + [row]
                    print(row, flush=True)
                    _timing.write(name, device, rows, options.out)
    if worker is not None:
        worker.close()
    rows = _timing.of_machine(rows, device)
    for case in options.cases:
        for batch in options.batches:
            curves = {m: [(r["sparsity"], r["ratio"]) for r in rows if (r["model"], r["case"], r["batch"]) == (m, case, batch)
                          and "ratio" in r] for m in options.models}
            if not any(curves.values()):
                continue
            path = options.out / f"{name}_{case}_{batch}.png"
            _timing.plot(path, f"{case}, batch {batch}, {device.type}: before / after sparsify", curves)


if __name__ == "__main__":
    main()
