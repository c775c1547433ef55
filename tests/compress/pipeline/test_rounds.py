"""Oracle: the formula of the schedule, counts of the materialised networks, and the plan and history that a run leaves."""

import json

import pytest

from compress import load
from compress.config_file import apply_override, validate
from compress.errors import UserError
from compress.pipeline.phases import phases
from compress.pipeline.run import dry_run, run

TINY = ["device=cpu", "data.name=digits", "data.train_images=200", "model.name=resnet20", "model.options={\"width\": 0.5}", "train.epochs=1", "finetune.epochs=1",
        "prune.seeds=[0]", "prune.calibration_images=64", "prune.recalibration_images=64", "prune.budget=params", "benchmark.enabled=false"]


def config(method, ratio, options, *overrides):
    raw = {"name": "r", "prune": {"methods": [method], "ratios": [ratio], "method_options": {method: options}}}
    for override in (*TINY, *overrides):
        apply_override(raw, override)
    return validate(raw)


def reached(folder):
    """The row of the only entry, and the epochs that it was fine-tuned for."""
    results = json.loads((folder / "results.json").read_text())
    (details,) = (entry for name, entry in results["meta"]["details"].items() if name != "dense")
    return results["rows"][1], details.get("history", [])


def test_rounds_come_from_the_options_or_else_from_the_run():
    assert [phase.ratio for phase in phases(config("eigendamage", 0.75, {}, "prune.rounds=2"), "eigendamage", 0.75)] == [0.5, 0.75]
    assert len(phases(config("eigendamage", 0.75, {"rounds": 3}, "prune.rounds=2"), "eigendamage", 0.75)) == 3
    assert len(phases(config("eigendamage", 0.75, {}), "eigendamage", 0.75)) == 1
    names = [phase.name for phase in phases(config("improved_eigendamage", 0.75, {"rounds": 2}), "improved_eigendamage", 0.75)]
    assert names == ["round1", "round1-growth", "round2"]
    assert len(phases(config("improved_eigendamage", 0.75, {"rounds": 2, "back_ratio": 0}), "improved_eigendamage", 0.75)) == 2


def test_with_a_pool_fraction_every_round_goes_for_the_ratio_and_may_be_the_last():
    found = phases(config("eigendamage", 0.75, {"rounds": 3, "pool_fraction": 0.5}), "eigendamage", 0.75)
    assert [(phase.ratio, phase.open) for phase in found] == [(0.75, True)] * 3
    assert not any(phase.open for phase in phases(config("eigendamage", 0.75, {"rounds": 3}), "eigendamage", 0.75))


def test_growth_has_its_own_rate_and_milestones():
    settings = config("improved_eigendamage", 0.5, {"rounds": 2, "growth_milestones": [0.25, 0.5, 0.75]}, "finetune.lr=0.001", "finetune.schedule=multistep")
    cut, growth, _ = (phase.tuning(settings.finetune) for phase in phases(settings, "improved_eigendamage", 0.5))
    assert (cut.lr, cut.milestones) == (0.001, [0.5, 0.75]) and growth.milestones == [0.25, 0.5, 0.75] and growth.lr == pytest.approx(0.01)
    settings = config("improved_eigendamage", 0.5, {"rounds": 2, "growth_lr_factor": 2})
    assert phases(settings, "improved_eigendamage", 0.5)[1].tuning(settings.finetune).lr == 2 * settings.finetune.lr


@pytest.mark.parametrize(("method", "ratio", "options", "overrides", "words"), [
    ("eigendamage", 0.99, {}, [], "at most 0.9"),
    ("improved_eigendamage", 0.9, {}, [], "in 1 round"),
    ("improved_eigendamage", 0.5, {"decomposition": "svd"}, ["prune.rounds=2"], "set back_ratio to 0"),
    ("improved_eigendamage", 0.5, {"decomposition": "cp", "rounds": 2}, [], "set back_ratio to 0"),
], ids=["cap", "one cycle", "svd", "cp"])
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, method, ratio, options, overrides, words):
    for action in (lambda chosen: run(chosen, tmp_path, log=lambda line: None), lambda chosen: dry_run(chosen, log=lambda line: None)):
        with pytest.raises(UserError, match=words) as error:
            action(config(method, ratio, options, *overrides))
        assert len(error.value.faults) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "options"), [
    ("eigendamage", {"cap": 0.5, "rounds": 3, "ekfac": False, "accept": "params"}),
    ("improved_eigendamage", {"rounds": 3}),
    ("improved_eigendamage", {"pool_fraction": 0.4, "rounds": 8}),
], ids=["iterative", "improved", "pool fraction"])
def test_a_dry_run_goes_through_all_rounds_and_shows_the_ranks(method, options):
    lines = []
    (row,) = dry_run(config(method, 0.7, options), log=lines.append)
    assert row["params_removed"] == pytest.approx(0.7, abs=0.01)
    assert len(lines) == 3 and "layer3.2.conv1 32x32->" in lines[2]


def test_a_dry_run_of_one_round_is_the_run(tmp_path):
    chosen = config("svd", 0.4, {}, "train.epochs=0", "finetune.epochs=0", "prune.recalibration_images=0")
    lines = []
    (row,) = dry_run(chosen, log=lines.append)
    done, _ = reached(run(chosen, tmp_path, log=lambda line: None))
    assert (row["params"], row["macs"]) == (done["params"], done["macs"]) and "->" in lines[-1]


@pytest.mark.slow_ci
@pytest.mark.parametrize(("options", "ends"), [({"pool_fraction": 0.5, "rounds": 7, "cap": 0.5}, True), ({"pool_fraction": 0.1, "rounds": 2}, False)],
                         ids=["ends early", "falls short"])
def test_rounds_of_a_pool_fraction_end_at_the_ratio_or_say_what_they_reached(tmp_path, options, ends):
    lines = []
    folder = run(config("eigendamage", 0.7, options), tmp_path, log=lines.append)
    row, history = reached(folder)
    entry = folder / "eigendamage-params0.7-s0"
    missing = json.loads((entry / "plan.json").read_text())["meta"].get("missing")
    told = [line for line in lines if "the rounds ended" in line]
    if ends:
        assert row["params_removed"] == pytest.approx(0.7, abs=0.01) and 1 < len(history) < 7 and missing is None and told == []
    else:
        assert row["params_removed"] < 0.6 and len(history) == 2
        kept = sum(parameter.numel() for parameter in load(entry).parameters())
        assert missing["params"] == pytest.approx(kept - 0.3 * kept / (1 - row["params_removed"]), abs=2)
        assert len(told) == 1 and f"{row['params_removed']:.1%}" in told[0] and "0.7" in told[0]
    # done before: nothing is made again, and the same is told
    again = []
    run(config("eigendamage", 0.7, options), tmp_path, log=again.append)
    assert any("done before" in line for line in again) and {path.name for path in entry.iterdir()} >= {"plan.json", "model.safetensors"}


@pytest.mark.slow_ci
@pytest.mark.parametrize(("first", "second"), [({"pool_momentum": 0.0}, {"pool_momentum": 0.95}), ({"back_ratio": 0.1}, {"back_ratio": 0.5}),
                                               ({"cap": 0.35}, {"cap": 0.6})], ids=["momentum", "back ratio", "cap"])
def test_options_of_the_cycles_change_a_run(tmp_path, first, second):
    shares = []
    for number, options in enumerate((first, second)):
        chosen = config("improved_eigendamage", 0.5, {"rounds": 3} | options, "train.epochs=0", "finetune.epochs=0", f"name=r{number}")
        folder = run(chosen, tmp_path, log=lambda line: None)
        plan = json.loads((folder / "improved_eigendamage-params0.5-s0" / "plan.json").read_text())
        grow = plan["meta"]["grow"]
        total = sum(map(sum, grow["shares"].values()))
        shares.append({name: [value / total for value in pair] for name, pair in grow["shares"].items()} | {"removed": grow["removed"]})
    assert shares[0] != shares[1]
