"""What `kfac_cp` leaves of the K-FAC loss, beside `cp`: every 3x3 layer of a trained CIFAR-10 ResNet at two ranks.

    python -m benchmarks.kfac_cp --data CIFAR_ROOT --weights FOLDER [--network resnet20] [--images 512] [--threads 1]

Losses 1/2 tr(G D A D^T) of the undamped moments (`true` Fisher, one label per image), as fractions of the loss of removing the layer, in ranks
R = o and 2 o. Also the seconds of one decomposition. FOLDER holds `<network>_cifar10.safetensors`.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks._published import BATCH, NETWORKS, RESULTS, bundle, parser, published
from compress.curvature import collect
from compress.curvature.quadratic import predicted_loss
from compress.decompose import cp, kfac_cp, recompose
from compress.files import write_json


def main() -> None:
    """Decompose every layer and store the losses."""
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--network", default="resnet20", choices=NETWORKS)
    command.add_argument("--images", type=int, default=512)
    command.add_argument("--out", type=Path, default=RESULTS / "kfac_cp.json")
    arguments = command.parse_args()
    torch.set_num_threads(arguments.threads)
    model = published(arguments.network, arguments.weights)
    batches = bundle(arguments.data).calibration(arguments.images, BATCH, torch.Generator().manual_seed(0))
    rows = []
    for name, entry in collect(model, batches, bias=False, generator=torch.Generator().manual_seed(0)).items():
        weight = model.get_submodule(name).weight.detach()
        if weight.ndim != 4 or weight.shape[1] < 16:  # the stem has three channels
            continue
        whole = predicted_loss(weight, entry.A, entry.G).item()
        for rank in (len(weight), 2 * len(weight)):
            row = {"layer": name, "shape": list(weight.shape), "rank": rank}
            for key, decompose in (("cp", lambda: cp(weight, rank)), ("kfac_cp", lambda: kfac_cp(weight, entry.A, entry.G, rank))):
                started = time.perf_counter()
                factors = decompose()
                row |= {f"{key}_seconds": round(time.perf_counter() - started, 3), key: predicted_loss(recompose(factors) - weight, entry.A, entry.G).item() / whole}
            rows.append(row | {"times_lower": row["cp"] / row["kfac_cp"]})
            print(json.dumps(rows[-1]), flush=True)
    lower = [row["times_lower"] for row in rows]
    summary = {"lowest": min(lower), "median": statistics.median(lower), "highest": max(lower)}
    print(json.dumps(summary))
    write_json(arguments.out, {"network": arguments.network, "images": arguments.images, "torch": torch.__version__, "times_lower": summary, "rows": rows})


if __name__ == "__main__":
    main()
