"""Oracle: a clock that is a function of the layers, read on the stored networks."""

import csv
import json

import pytest
import torch

from compress import load
from compress.errors import Unreachable
from compress.methods.timing import ABOVE, BELOW
from compress.pipeline.run import dry_run, run
from compress.report.results import read_results
from models import build

from ..methods.clock import Clock, nanoseconds
from .test_rounds import config

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def saved(folder):
    dense = build("resnet20", 10, width=0.5, in_channels=1)
    return 1 - nanoseconds(load(folder), IMAGES) / nanoseconds(dense, IMAGES)


@pytest.mark.parametrize("method", ["l1", "kfac_tucker"])
def test_rounds_of_a_run_approach_the_ratio_of_the_time(tmp_path, monkeypatch, method):
    Clock().install(monkeypatch)
    chosen, lines = config(method, 0.3, {}, "prune.budget=latency", "prune.latency_batch_size=8", "prune.rounds=2", "prune.round_to=2"), []
    folder = run(chosen, tmp_path, log=lines.append)
    found = saved(folder / f"{method}-latency0.3-s0")
    assert 0.3 - BELOW <= found <= 0.3 + ABOVE
    row = json.loads((folder / "results.json").read_text())["rows"][1]
    assert row["budget"] == "latency" and row["latency_removed"] == pytest.approx(found)
    with (folder / "results.csv").open() as file:
        assert "latency_removed" in next(csv.reader(file))
    assert any(f"{found:.1%} of the latency saved at batch 8" in line for line in lines)
    plan = json.loads((folder / f"{method}-latency0.3-s0" / "plan.json").read_text())
    assert plan["meta"]["latency"] == {"asked": 0.3, "saved": pytest.approx(found), "batch_size": 8}
    assert "At ratio 0.3 of the latency, " in (folder / "report.html").read_text()


def test_a_dry_run_measures_and_plans_alike(tmp_path, monkeypatch):
    Clock().install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    chosen = config("svd", 0.3, {}, "prune.budget=latency", "prune.latency_batch_size=8")
    (planned,) = dry_run(chosen, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    row = json.loads((run(chosen, tmp_path, log=lambda line: None) / "results.json").read_text())["rows"][1]
    assert (planned["params"], planned["macs"]) == pytest.approx((row["params"], row["macs"]), rel=0.2)  # svd of initial weights there, of trained ones here


def test_a_ratio_out_of_reach_is_reported_while_the_other_entries_go_on(tmp_path, monkeypatch):
    Clock(call=1e5).install(monkeypatch)
    chosen, lines = config("l1", 0.6, {}, "prune.budget=latency", "prune.latency_batch_size=8", "prune.ratios=[0.95,0.2]", "prune.methods=[\"l1\",\"l2\"]"), []
    sentence = "l1-latency0.95-s0: A budget that removes 0.95 of the latency cannot be reached"
    with pytest.raises(Unreachable, match=f"{sentence}.*\nl2-latency0.95-s0: A budget"):
        run(chosen, tmp_path, log=lines.append)
    results = read_results(tmp_path / chosen.name)
    assert [(row["method"], row["ratio"]) for row in results["rows"]] == [("dense", 0.0), ("l1", 0.2), ("l2", 0.2)]
    assert len(results["meta"]["unreachable"]) == 2 and any(sentence in line for line in lines)
    assert sentence in (tmp_path / chosen.name / "report.html").read_text()
    with pytest.raises(Unreachable, match=sentence):  # a dry run goes on in the same way
        dry_run(chosen, log=lines.append)
    assert lines[-1].startswith("  ")


def test_a_run_of_which_nothing_can_be_reached_reports_the_network_itself(tmp_path, monkeypatch):
    Clock(call=1e7).install(monkeypatch)
    chosen = config("l1", 0.6, {}, "prune.budget=latency")
    with pytest.raises(Unreachable, match="l1-latency0.6-s0"):
        run(chosen, tmp_path, log=lambda line: None)
    assert [row["method"] for row in read_results(tmp_path / chosen.name)["rows"]] == ["dense"]
