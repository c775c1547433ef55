"""Pruning at initialisation: random, magnitude, SNIP, GraSP and SynFlow, compared by accuracy, test time and FLOPs.

    python -m compress.experiments.at_init --config_path configs/at_init/<name>.json
    python -m compress.experiments.at_init --model-class lottery --model vgg16 --dataset cifar10 --experiment example \\
        --pruner synflow --compression-ratio 5

The document's own flags are kept but for the ambiguous `--compression`. Experiments:

* `singleshot`: prune, train, measure, for every criterion and compression ratio.
* `multishot`: several rounds of training, pruning and rewinding before the final training (with `magnitude`: iterative magnitude pruning).
* `unit-conservation`, `layer-conservation`, `imp-conservation`, `schedule-conservation`: what the scores conserve (`at_init_flow`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from compress.experiments import at_init_flow, at_init_flow_tables, at_init_tables
from compress.experiments.at_init_runs import all_runs, multishot, rows_of, singleshot, start_model
from compress.experiments.at_init_settings import AtInitConfig, arguments, settings_of
from compress.experiments.base import Log, RunFolder, data_of, main_guard, say


def _training(settings: AtInitConfig, folder: RunFolder, log: Log) -> list[dict[str, Any]]:
    rows = []
    for seed in settings.seeds:
        data = data_of(settings, seed)
        model = start_model(settings, data, seed)
        for pruner, ratio, levels in all_runs(settings):
            name = f"{pruner}-{ratio:g}x-s{seed}"
            compute = partial(singleshot, settings, data, model, pruner, ratio, seed, log)
            if levels is not None:
                name = f"{pruner}-{ratio:g}x-l{levels}-s{seed}"
                compute = partial(multishot, settings, data, model, pruner, ratio, levels, seed, log)
            facts = {"pruner": pruner, "compression_ratio": ratio, "levels": levels, "seed": seed, "scope": settings.scope}
            row = rows_of(folder.run(name, compute, log), facts)
            rows.append(row | {"mac_fraction": row["macs_nonzero"] / row["macs"], "flops": 2 * row["macs_nonzero"]})
    at_init_tables.write(rows, folder.path, settings.detail_ratio)
    return rows


def _conservation(settings: AtInitConfig, folder: RunFolder, log: Log) -> list[dict[str, Any]]:
    rows = []
    for seed in settings.seeds:
        data = data_of(settings, seed)
        model = start_model(settings, data, seed)
        if settings.experiment == "imp-conservation":
            compute = partial(at_init_flow.imp_conservation, settings, data, model, seed, log)
            rows.append({"seed": seed} | folder.run(f"imp-s{seed}", compute, log))
            continue
        for pruner in settings.pruners:
            if settings.experiment == "schedule-conservation":
                for ratio in settings.compression_ratios:
                    compute = partial(at_init_flow.schedule_conservation, settings, data, model, pruner, ratio, seed)
                    found = folder.run(f"{pruner}-{ratio:g}x-s{seed}", compute, log)
                    rows += [{"pruner": pruner, "compression_ratio": ratio, "seed": seed} | row for row in found["schedules"]]
            else:
                run = {"unit-conservation": at_init_flow.unit_conservation, "layer-conservation": at_init_flow.layer_conservation}
                compute = partial(run[settings.experiment], settings, data, model, pruner, seed)
                rows.append({"pruner": pruner, "seed": seed} | folder.run(f"{pruner}-s{seed}", compute, log))
    return rows


def run(settings: AtInitConfig, folder: RunFolder, log: Log = say) -> list[dict[str, Any]]:
    """Run the experiment of the settings; writes results, tables and figures, and returns the rows."""
    trains = settings.experiment in ("singleshot", "multishot")
    rows = (_training if trains else _conservation)(settings, folder, log)
    folder.write_rows(rows)
    if not trains:
        at_init_flow_tables.write(settings.experiment, rows, folder.path)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = arguments().parse_args(argv)
    settings = settings_of(args)
    run(settings, RunFolder(args.output_dir, settings, args.overwrite))


if __name__ == "__main__":
    sys.exit(main_guard(main))
