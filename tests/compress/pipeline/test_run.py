"""Oracle: one small run on digits, read back from its files and checked against what the saved networks themselves give."""

import json

import pytest
import torch

from compress import load
from compress.config import DataConfig
from compress.config_file import validate
from compress.cost import count
from compress.data import load_data
from compress.errors import RunError, UserError
from compress.pipeline import entry, stages
from compress.pipeline.run import dry_run, run
from compress.train import evaluate

SMALL = {
    "name": "small", "device": "cpu", "data": {"train_images": 300}, "model": {"name": "resnet20", "options": {"width": 0.5}},
    "train": {"epochs": 2, "lr": 0.05}, "finetune": {"epochs": 1, "distill": {}},
    "prune": {"methods": ["l1", "taylor_fo"], "ratios": [0.5, 0.8], "calibration_images": 128, "recalibration_images": 128},
    "benchmark": {"batch_size": 8, "seconds": 0.01},
}


def _own(function):
    """The change that takes a network of `odd_networks`, with a ratio that all of them reach."""
    return {"model": {"name": None, "import": f"tests.compress.pipeline.odd_networks:{function}"}, "prune": {"ratios": [0.2]}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("runs")
    lines = []
    folder = run(validate(SMALL), output, log=lines.append)
    return folder, lines


def _rows(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_the_rows_are_the_dense_network_and_every_method_at_every_ratio(finished):
    rows = _rows(finished[0])
    assert [(row["method"], row["budget"], row["ratio"]) for row in rows] == [
        ("dense", "params", 0.0), ("l1", "macs", 0.5), ("l1", "macs", 0.8), ("taylor_fo", "macs", 0.5), ("taylor_fo", "macs", 0.8)]


def test_every_row_equals_what_its_saved_network_gives(finished):
    folder = finished[0]
    data = load_data(DataConfig(train_images=300), seed=0, device="cpu")
    for row in _rows(folder)[1:]:
        model = load(folder / f"{row['method']}-macs{row['ratio']:g}-s0")
        cost = count(model, torch.zeros(1, *data.input_shape))
        assert (row["params"], row["macs"], row["gflops"]) == (cost.params, cost.macs, 2e-9 * cost.macs)
        assert evaluate(model, data.test, 512)["accuracy"] == row["accuracy"]
        assert row["accuracy_base"] == _rows(folder)[0]["accuracy"]
        assert row["latency_ms"]["1"]["median"] > 0 and row["latency_ms"]["8"]["p10"] <= row["latency_ms"]["8"]["p90"]


def test_the_budget_is_met_within_one_percent_of_the_original(finished):
    for row in _rows(finished[0])[1:]:
        assert abs(row["macs_removed"] - row["ratio"]) <= 0.01


def test_the_report_shows_what_the_check_after_surgery_found(finished):
    details = json.loads((finished[0] / "results.json").read_text())["meta"]["details"]
    for name, detail in details.items():
        if name != "dense":
            assert detail["verified"]["largest difference, relative to the largest output"] <= 1e-5
            assert any(row["status"] == "pinned" and row["layer"] == "linear" for row in detail["coverage"])
    assert "zeroed where they are read" in (finished[0] / "report.html").read_text()


def test_the_run_folder_holds_what_it_promises_and_nothing_half_done(finished):
    folder = finished[0]
    for name in ("resolved.json", "results.json", "results.csv", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "figures").glob("*.png"))) >= 3
    entry = folder / "l1-macs0.5-s0"
    assert {path.name for path in entry.iterdir()} == {"plan.json", "model.safetensors", "model.json", "stage.json", "begun.json"}
    assert {path.name for path in (folder / "base").iterdir()} == {"model.safetensors", "stage.json", "begun.json"}


def test_the_same_command_again_trains_nothing_and_reports_the_same(finished, monkeypatch):
    folder = finished[0]
    before = _rows(folder)
    for module in (stages, entry):
        monkeypatch.setattr(module, "fit", lambda *a, **k: pytest.fail("trained again"))
    run(validate(SMALL), folder.parent, mode="resume", log=lambda line: None)
    assert _rows(folder) == before
    assert not torch.are_deterministic_algorithms_enabled()  # a setting of the run, not of the caller's process


def test_ratios_that_agree_in_six_digits_have_folders_of_their_own():
    config = validate(SMALL)
    assert entry.entry_name(config, "l1", 0.5, 0) == "l1-macs0.5-s0"
    assert entry.entry_name(config, "l1", 0.50000001, 0) == "l1-macs0.50000001-s0"


def test_another_configuration_under_the_same_name_is_refused(finished):
    changed = {**SMALL, "finetune": {"epochs": 2, "distill": {}}}
    with pytest.raises(UserError, match="`finetune.epochs` is 1 there and 2 now"):
        run(validate(changed), finished[0].parent, log=lambda line: None)


def test_running_out_of_memory_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="memory is not enough") as raised:
        dry_run(validate({**SMALL, "model": {"name": "resnet20", "options": {"width": 1e12}}}), log=lambda line: None)
    assert "\n" not in str(raised.value)


def test_a_damaged_entry_is_made_again_bit_for_bit(finished):
    folder = finished[0]
    file = folder / "l1-macs0.5-s0" / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-100])
    run(validate(SMALL), folder.parent, log=lambda line: None)
    assert file.read_bytes() == before


def test_dry_run_writes_nothing_and_its_plan_is_the_one_that_is_carried_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    rows = dry_run(validate({**SMALL, "prune": {"methods": ["l1"], "ratios": [0.5]}}), log=lines.append)
    assert list(tmp_path.iterdir()) == []
    assert abs(rows[0]["macs_removed"] - 0.5) <= 0.01
    assert any("->" in line for line in lines)


@pytest.mark.parametrize(("change", "words"), [
    ({"prune": {"methods": ["taylor_of"]}}, "did you mean 'taylor_fo'"),
    ({"prune": {"methods": ["l1"], "method_options": {"l1": {"norm": 1}}}}, "no option 'norm'"),
    ({"prune": {"methods": ["l1"], "method_options": {"l2": {}}}}, "not in prune.methods"),
    ({"prune": {"methods": ["eigendamage"], "budget": "latency"}}, "takes params or macs"),
    ({"prune": {"ratios": [0.8], "exclude": ["layer1.*", "layer2.*"]}}, "cannot be reached: at most"),
    ({"prune": {"ratios": [0.6], "max_layer_ratio": 0.1}}, "cannot be reached: at most"),
    ({"prune": {"exclude": ["layer9.*"]}}, "'layer9.*' matches no"),
    ({"model": {"name": "resnett20"}}, "did you mean 'resnet20'"),
    ({"model": {"name": "resnet20", "options": {"with": 2}}}, "did you mean 'width'"),
    ({"model": {"name": "resnet20", "options": {"num_classes": 2}}}, "set by the toolkit"),
    ({"model": {"name": "resnet20", "options": {"width": -1}}}, "width"),
    ({"model": {"name": "vgg16"}}, "32 pixels"),
    ({"model": {"name": "torchvision/resnet"}}, "did you mean"),
    ({"model": {"name": None}}, "`name` of the registry"),
    ({"model": {"import": "nowhere.at_all:f"}}, "cannot be imported"),
    ({"model": {"import": "json:loadz"}}, "has no 'loadz'"),
    ({"model": {"import": "json:dumps"}}, "failed with num_classes=10"),
    ({"model": {"name": "resnet20", "weights": "/nonexistent/w.safetensors"}}, "/nonexistent/w.safetensors"),
    ({"data": {"name": "cifar11"}}, "did you mean 'cifar10'"),
    ({"prune": {"methods": ["bn_scale"]}, "model": {"name": "fc"}}, "bn_scale"),
    ({"data": {"name": "cifar10", "root": "/nonexistent"}}, "/nonexistent"),
    ({"data": {"mean": [0.1, 0.2, 0.3]}}, "1 channel"),
    ({"data": {"train_images": 100000}}, "100000"),
    ({"device": "cuda:77"}, "GPU"),
    ({"data": {"val_fraction": 0}, "finetune": {"select": "val"}}, "no validation images"),
    ({"finetune": {"batch_size": 1}}, "BatchNorm cannot train"),
    (_own("evaluation_only"), "(training: evaluation only)"),
    (_own("one_image"), "returns [1, 10] for 2 image(s)"),
    (_own("extra_state"), "'_extra_state'"),
    (_own("locked"), "cannot be copied"),
    (_own("frozen"), "no trainable parameter"),
    (_own("leaves"), "SystemExit: usage"),
])
def test_what_only_the_pieces_together_show_is_one_sentence_and_nothing_is_written(tmp_path, change, words):
    with pytest.raises(UserError) as raised:
        run(validate({"name": "faulty", "device": "cpu", **change}), tmp_path, log=lambda line: None)
    assert words in str(raised.value)
    assert len(raised.value.faults) == 1 and "\n" not in raised.value.faults[0]
    assert list(tmp_path.iterdir()) == []
