"""Gradual against instant pruning: is it better to prune in several steps with training between, or at once and train afterwards?

    python -m compress.experiments.gradual --config_path configs/gradual/<name>.json [--set seeds=[0,1,2]]

`kind: "prunes"`: one final sparsity, reached in 8, 4, 2 or 1 prunes, the same total training split evenly between them.
`kind: "versus"`: the arms below for every target sparsity s_k, with L steps (or epochs) after each prune:

| arm | prunes | training |
|---|---|---|
| gradual | along `path`: `cumulative` (the targets s_1 ... s_k) or `schedule` (a schedule in `prunes` steps) | L after each |
| instant_total | once, to s_k | as many steps as gradual in all |
| instant_tail | once, to s_k | L, as gradual has after its last prune |
| dense_continued | never | as instant_total |
| scratch_mask | gradual's final mask on new initial weights | as instant_total |

The published comparison used equal totals only; the arm instant_tail tells how much of the difference is training after the last prune.
Runs of one seed share data order and base network, differences are paired by seed. Global magnitude pruning; accuracy is on the test set in
evaluation mode.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from compress.config import FinetuneConfig
from compress.data import DataBundle
from compress.errors import UserError
from compress.experiments import plots
from compress.experiments.base import Log, RunFolder, accuracy, base_model, data_of, fresh_model, main_guard, say
from compress.experiments.settings import Experiment, common_arguments, load_settings, one_of
from compress.experiments.summary import paired, summarise
from compress.experiments.training import steps_per_epoch, train_in_phases
from compress.masks import Masks, load_masked, save_masked
from compress.masks.restart import reinitialize
from compress.schedule import SCHEDULES, explicit, sparsity_at, targets

ARMS = ("gradual", "instant_total", "instant_tail", "dense_continued", "scratch_mask")


class GradualConfig(Experiment):
    """Settings of the gradual pruning study."""

    kind: Literal["prunes", "versus"] = Field("versus", description="which of the two published experiments")
    scope: Literal["conv", "conv+linear", "all-weights"] = Field("all-weights", description="what masks may touch")
    final_sparsity: float = Field(0.9, gt=0, lt=1, description="prunes: the sparsity that all runs end at")
    prunes: list[int] = Field(
        [8, 4, 2, 1], min_length=1, description="prunes: numbers of prunes; versus with path `schedule`: the first one is used"
    )
    targets: list[float] = Field([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95], description="versus: sparsities compared")
    path: Literal["cumulative", "schedule"] = Field("cumulative", description="versus: how the gradual arm reaches a target")
    schedule: str = Field("geometric", description=f"pruning schedule: {', '.join(SCHEDULES)}")
    arms: list[str] = Field(list(ARMS), min_length=1, description="versus: arms to run; `gradual` is always among them")
    epochs: float = Field(12, ge=0, description="versus: training after each prune, in epochs; prunes: training in all")
    steps: int | None = Field(None, ge=1, description="the same in optimizer steps; overrides epochs")
    measure: Literal["every", "last"] = Field("every", description="test accuracy after every prune and phase, or at the end of a run only")
    finetune: FinetuneConfig = Field(
        default_factory=lambda: FinetuneConfig(optimizer="adam", lr=1e-3, weight_decay=1e-4, schedule="constant"),
        description="training between and after prunes; epochs is not used",
    )

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, value: str) -> str:
        return one_of(value, list(SCHEDULES), "pruning schedule")

    @model_validator(mode="after")
    def _measured(self) -> GradualConfig:
        if self.measure == "last" and (self.kind, self.path) != ("versus", "schedule"):
            raise ValueError('measure "last" leaves intermediate targets unmeasured; it needs kind "versus" and path "schedule"')
        return self


class Study:
    """One experiment: settings, folder and the networks of each seed."""

    def __init__(self, settings: GradualConfig, folder: RunFolder, log: Log) -> None:
        self.settings, self.folder, self.log = settings, folder, log
        for arm in settings.arms:
            if arm not in ARMS:
                raise UserError(f"Unknown arm {arm!r}; known: {', '.join(ARMS)}.")
        explicit(settings.targets)

    def length(self, data: DataBundle) -> int:
        """Steps of `epochs` (or `steps`)."""
        if self.settings.steps is not None:
            return self.settings.steps
        return max(1, round(self.settings.epochs * steps_per_epoch(data, self.settings.data.batch_size)))

    def train(
        self, masks: Masks, data: DataBundle, seed: int, sparsities: Sequence[float | None], steps: Sequence[int], **options: Any
    ) -> list:
        """Phases of pruning and training with this study's settings."""
        settings = self.settings
        batch = {"batch_size": settings.data.batch_size, "eval_batch_size": settings.data.eval_batch_size}
        return train_in_phases(
            masks,
            data,
            settings.finetune,
            **batch,
            seed=seed,
            sparsities=sparsities,
            steps=steps,
            log=self.log,
            every=settings.measure == "every",
            **options,
        )

    def masks(self, model: Any) -> Masks:
        """Fresh masks on a copy of the network."""
        return Masks.attach(copy.deepcopy(model), self.settings.scope, self.settings.exclude)

    def prunes(self, data: DataBundle, model: Any, seed: int) -> list[dict[str, Any]]:
        """Rows of `kind: prunes` for one seed: one per number of prunes and prune."""
        rows, total = [], self.length(data)
        for count in self.settings.prunes:

            def run(count: int = count) -> dict[str, Any]:
                steps = [total * (k + 1) // count - total * k // count for k in range(count)]
                return {
                    "phases": self.train(
                        self.masks(model), data, seed, targets(self.settings.schedule, count, self.settings.final_sparsity), steps
                    )
                }

            phases = self.folder.run(f"prunes{count}-s{seed}", run, self.log)["phases"]
            rows += [{"arm": f"{count} prunes", "prunes": count, "target": phase["sparsity"], "seed": seed} | phase for phase in phases]
        return rows

    def mask_file(self, target: float, seed: int) -> Path:
        """Where the gradual arm's mask at a target is kept."""
        return self.folder.path / "masks" / f"gradual-{target:g}-s{seed}.safetensors"

    def gradual(self, data: DataBundle, model: Any, seed: int) -> dict[float, list[dict[str, Any]]]:
        """Phases that lead to each target; the masks at their end go to `mask_file`.

        The cumulative path is one training through all targets.
        """
        settings, length = self.settings, self.length(data)
        goals = settings.targets

        def course(path: list[float], reached: dict[int, float]) -> dict[str, Any]:
            masks = self.masks(model)

            def keep(phase: int) -> None:
                if phase in reached:
                    file = self.mask_file(reached[phase], seed)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_masked(masks, file)

            return {"phases": self.train(masks, data, seed, path, [length] * len(path), at_phase_end=keep)}

        if settings.path == "cumulative":
            phases = self.folder.run(f"gradual-s{seed}", lambda: course(goals, dict(enumerate(goals))), self.log)["phases"]
            return {target: phases[: k + 1] for k, target in enumerate(goals)}
        count, found = settings.prunes[0], {}
        for target in goals:
            path = targets(settings.schedule, count, target)
            result = self.folder.run(f"gradual-{target:g}-s{seed}", partial(course, path, {count - 1: target}), self.log)
            found[target] = result["phases"]
        return found

    def once(self, data: DataBundle, model: Any, seed: int, sparsity: float | None, steps: int) -> dict[str, Any]:
        """One prune (or none), then training."""
        return {"phases": self.train(self.masks(model), data, seed, [sparsity], [steps])}

    def scratch(self, data: DataBundle, target: float, seed: int, steps: int) -> dict[str, Any]:
        """The gradual arm's mask on initial weights of another draw."""
        masks = load_masked(fresh_model(self.settings, data, seed), self.mask_file(target, seed))
        reinitialize(masks, fresh_model(self.settings, data, seed + 1000))
        return {"phases": self.train(masks, data, seed, [None], [steps])}

    def versus(self, data: DataBundle, model: Any, seed: int) -> list[dict[str, Any]]:
        """Rows of `kind: versus` for one seed: one per arm and target."""
        rows, length = [], self.length(data)
        for target, path in self.gradual(data, model, seed).items():
            total = length * len(path)
            arms = {
                "instant_total": partial(self.once, data, model, seed, target, total),
                "instant_tail": partial(self.once, data, model, seed, target, length),
                "dense_continued": partial(self.once, data, model, seed, None, total),
                "scratch_mask": partial(self.scratch, data, target, seed, total),
            }
            found = {"gradual": path}
            for arm in self.settings.arms:
                if arm != "gradual":
                    # The unpruned network's training depends on its length only.
                    goal = f"{total}-steps" if arm == "dense_continued" else f"{target:g}"
                    found[arm] = self.folder.run(f"{arm}-{goal}-s{seed}", arms[arm], self.log)["phases"]
            for arm, phases in found.items():
                sums = {key: sum(phase[key] for phase in phases) for key in ("steps", "mac_steps")}
                rows.append({"arm": arm, "target": target, "seed": seed} | phases[-1] | sums | {"phases": phases})
        return rows


def figures(settings: GradualConfig, folder: RunFolder, rows: list[dict[str, Any]]) -> None:
    """All figures of the study, each with its CSV."""
    path = folder.path / "figures"
    summary = summarise(rows, "accuracy", ("arm", "target"))
    by_arm: dict[str, list] = {}
    for entry in summary:
        by_arm.setdefault(entry["arm"], []).append((entry["target"], entry["mean"], entry["low"], entry["high"]))
    plots.error_bars(
        path / "gradual_vs_instant", by_arm, "Accuracy after pruning (bars: smallest to largest seed)", "fraction pruned", "accuracy"
    )
    simple = {arm: [(x, mean) for x, mean, *_ in points] for arm, points in by_arm.items()}
    plots.lines(path / "gradual_pruning", simple, "Accuracy against fraction pruned", "fraction pruned", "accuracy")
    grid = [k / 50 for k in range(51)]
    final = settings.final_sparsity if settings.kind == "prunes" else settings.targets[-1]
    curves = {name: [(t, sparsity_at(name, t, final)) for t in grid] for name in SCHEDULES}
    plots.lines(path / "schedules", curves, "Pruning schedules", "progress", "sparsity")
    last = max(row["target"] for row in rows)
    groups = {
        f"{target:g}": {e["arm"]: e["mean"] for e in summary if e["target"] == target}
        for target in dict.fromkeys(e["target"] for e in summary)
    }
    plots.bars(path / "final_accuracy", groups, "Accuracy at matched sparsity", "fraction pruned", "accuracy")
    seed = settings.seeds[0]
    phases = [row for row in rows if row["seed"] == seed and row["arm"] in ("gradual", f"{settings.prunes[0]} prunes")]
    phases = phases[-1]["phases"] if settings.kind == "versus" else phases
    course = [
        point
        for p in phases
        for point in ((p["step"], p["accuracy_pruned"]), (p["step"] + p["steps"], p["accuracy"]))
        if point[1] is not None
    ]
    marks = [p["step"] for p in phases]
    plots.lines(
        path / "course",
        {f"to {last:.3g}, seed {seed}": course},
        "Accuracy during gradual pruning (dashed: prunes)",
        "step",
        "accuracy",
        marks,
    )


def run(settings: GradualConfig, folder: RunFolder, log: Log = say) -> list[dict[str, Any]]:
    """Run the study, write results and figures, and return the rows."""
    study = Study(settings, folder, log)
    rows, dense = [], {}
    for seed in settings.seeds:
        data = data_of(settings, seed)
        model = base_model(settings, data, seed, folder, log)
        dense[seed] = accuracy(model, data, settings)
        rows += getattr(study, settings.kind)(data, model, seed)
    keys = ("arm", "target") if settings.kind == "versus" else ("arm", "phase")
    comparisons = paired(rows, "accuracy", "gradual") if settings.kind == "versus" else []
    folder.write_rows(rows, dense_accuracy=dense, summary=summarise(rows, "accuracy", keys), paired_with_gradual=comparisons)
    figures(settings, folder, rows)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m compress.experiments.gradual", description=__doc__.split("\n")[0])
    common_arguments(parser)
    args = parser.parse_args(argv)
    settings = load_settings(GradualConfig, args.config_path, args.set)
    run(settings, RunFolder(args.output_dir, settings, args.overwrite))


if __name__ == "__main__":
    sys.exit(main_guard(main))
