"""Oracle: networks whose right answer is known beforehand (planted dead channels, counts by hand), and a second process."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from compress import compress, load, save
from compress.cost import count
from compress.errors import RunError, UserError
from compress.plan import Plan
from models import build


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def _locked():
    model = _net()
    model.lock = threading.Lock()
    return model


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_planted_dead_channels_go_first_and_the_function_stays():
    model = _net()
    with torch.no_grad():
        for dead in (1, 4, 6):
            model[0].weight[dead] = 0
            model[0].bias[dead] = 0
    ratio = 1 - (3 * 5 * 9 * 64 + 5 * 16 * 9 * 64 + 160) / (3 * 8 * 9 * 64 + 8 * 16 * 9 * 64 + 160)
    small, _, report = compress(model, X, budget={"macs": ratio})
    assert small[0].weight.shape == (5, 3, 3, 3) and small[2].weight.shape == (16, 5, 3, 3)
    torch.testing.assert_close(small.eval()(X), model.eval()(X), rtol=1e-5, atol=1e-6)
    assert report.macs_removed == pytest.approx(ratio)
    assert report.widths["0"] == (8, 5) and report.widths["2"] == (16, 16)
    error = report.verified["largest difference, relative to the largest output"]
    assert error <= 1e-5 and f"{error:.1e}" in str(report)


def test_the_given_network_is_not_changed_and_the_copy_keeps_its_mode():
    model = _net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, _, _ = compress(model, X, method="l2", budget={"params": 0.4})
    assert small.training and model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_masked_network_reports_its_density_and_no_channels():
    small, _, report = compress(_net(), X, method="mask_magnitude", budget={"weights": 0.75})
    weights = torch.cat([small[i].weight.flatten() for i in (0, 2, 6)])
    assert report.density == pytest.approx(0.25, abs=1e-3)
    assert float((weights != 0).double().mean()) == pytest.approx(report.density)
    assert "75.0% of the weights" in str(report) and report.coverage == [] and report.pinned == {}


def test_the_budget_is_of_the_quantity_it_names():
    model = build("resnet20", 10, width=0.5).eval()
    x = torch.randn(1, 3, 16, 16)
    for quantity, ratio in (("params", 0.6), ("macs", 0.6)):
        small, _, report = compress(model, x, budget={quantity: ratio})
        removed = 1 - getattr(count(small, x), quantity) / getattr(count(model, x), quantity)
        assert removed == pytest.approx(ratio, abs=0.01)
        assert getattr(report, f"{quantity}_removed") == pytest.approx(removed)


def test_recalibration_uses_the_calibration_data_only_where_asked():
    model = build("resnet20", 10, width=0.5).eval()
    batches = [(torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))) for _ in range(2)]
    plain, _, _ = compress(model, batches[0][0], batches, recalibrate=False)
    fresh, _, _ = compress(model, batches[0][0], batches)
    assert torch.equal(plain.bn1.running_mean, torch.zeros_like(plain.bn1.running_mean))
    expected = torch.cat([fresh.conv1(x) for x, _ in batches]).mean((0, 2, 3))
    torch.testing.assert_close(fresh.bn1.running_mean, expected, rtol=1e-4, atol=1e-5)
    others = [(x + 1, y) for x, y in batches]
    shifted, _, _ = compress(model, batches[0][0], batches, recalibrate=others)
    torch.testing.assert_close(shifted.bn1.running_mean, torch.cat([fresh.conv1(x) for x, _ in others]).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"method": "l3x"}, "Unknown method"), ({"budget": {"flops": 0.5}}, "params, macs"), ({"budget": {"macs": 50}}, r"\[0, 1\)"),
    ({"budget": {"macs": 0.5, "params": 0.5}}, "one of"), ({"method": "taylor_fo"}, "calibration"), ({"options": {"normalise": "max"}}, "did you mean 'normalize'"),
    ({"budget": {"macs": 0.9}, "max_layer_ratio": 0.3}, "cannot be reached"), ({"exclude": ["nothing"]}, "matches no"),
    ({"budget": 0.5}, "takes one of"), ({"budget": "macs"}, "takes one of"), ({"model": "resnet20"}, "expected a torch.nn.Module"),
    ({"calibration": 3}, "got a int"), ({"calibration": [X]}, "batch 0"), ({"calibration": (X, X)}, "batch 0"), ({"calibration": [(X, X[:1])]}, "batch 0"), ({"recalibrate": [X]}, "recalibrate must be batches"),
    ({"exclude": "nothing"}, "'nothing' matches no"), ({"model": _locked()}, "cannot be copied"),
    ({"allocation": "layerwise"}, "Unknown allocation"), ({"budget": {"macs": "half"}}, r"\[0, 1\)"),
])
def test_a_wrong_argument_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        compress(**{"model": _net(), "example_inputs": X} | arguments)
    assert "\n" not in str(raised.value)


FRESH = """
import sys, torch
from compress import load
x = torch.load(sys.argv[2], weights_only=True)
torch.set_num_threads(1)
torch.save(load(sys.argv[1])(x), sys.argv[3])
"""


def test_load_in_a_fresh_process_gives_bit_identical_outputs(tmp_path):
    model = build("resnet20", 10, width=0.5).eval()
    x = torch.randn(4, 3, 16, 16)
    small, plan, _ = compress(model, x, budget={"macs": 0.7})
    save(small, plan, tmp_path / "net")
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "net"), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")], check=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), small(x))


def test_a_network_of_the_users_own_is_loaded_into_a_freshly_built_one(tmp_path):
    small, plan, _ = compress(_net(), X, budget={"macs": 0.5})
    small = small.to(torch.bfloat16)
    save(small, plan, tmp_path)
    with pytest.raises(UserError, match="freshly built"):
        load(tmp_path)
    again = load(tmp_path, _net())
    assert again[0].weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(X.bfloat16()), small.eval()(X.bfloat16()))


def test_a_tie_survives_compression_saving_and_loading(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 3, padding=1)
            self.again = self.inner
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.again(self.inner(self.stem(x)).relu()).relu().mean((2, 3)))

    torch.manual_seed(0)
    small, plan, report = compress(Tied(), X, budget={"macs": 0.5})
    save(small, plan, tmp_path)
    again = load(tmp_path, Tied())
    assert again.inner.weight is again.again.weight
    assert sum(p.numel() for p in again.parameters()) == report.after.params
    with torch.no_grad():
        assert torch.equal(again(X), small.eval()(X))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "model.json").unlink(), "does not exist"),
    (lambda f: (f / "model.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "model.json").write_text("[]"), "not a network description"),
    (lambda f: (f / "plan.json").unlink(), "cannot be read"),
    (lambda f: (f / "plan.json").write_text('{"format": 1, "steps": 3}'), "steps"),
    (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe"), "not JSON"),
    (lambda f: (f / "plan.json").write_text('{"format": 1, "steps": [{"kind": ["prune"]}]}'), "steps"),
    (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "checksum"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "checksum"),
])
def test_a_damaged_folder_is_one_sentence(tmp_path, damage, words):
    small, plan, _ = compress(_net(), X)
    save(small, plan, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        load(tmp_path, _net())
    assert "\n" not in str(raised.value)


def test_a_layer_whose_weight_is_read_by_the_module_around_it_is_named_or_left_alone():
    """Without gradients `nn.TransformerEncoderLayer` evaluates by a fused operator that reads `linear1.weight`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(64, 10)).eval()
    x = torch.randn(2, 4, 16)
    try:
        small, _, _ = compress(model, x, method="svd", budget={"params": 0.3})
    except RunError as error:
        assert "'weight'" in str(error)
        small, _, _ = compress(model, x, method="svd", budget={"params": 0.1}, exclude=["0.*"])
    with torch.no_grad():
        assert small(x).shape == (2, 10)


def test_what_cannot_be_stored_or_rebuilt_is_one_sentence(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"epoch": 3}

    with pytest.raises(UserError, match="'_extra_state'"):
        save(Extra(2, 2), Plan(), tmp_path / "extra")
    assert not (tmp_path / "extra").exists()
    model = nn.Linear(2, 2)
    model.build_spec = {"name": "resnet20"}
    save(model, Plan(), tmp_path / "net")
    with pytest.raises(UserError, match="does not describe"):
        load(tmp_path / "net")


def test_a_plan_for_another_network_is_refused(tmp_path):
    small, plan, _ = compress(_net(), X)
    save(small, plan, tmp_path)
    with pytest.raises(UserError):
        load(tmp_path, nn.Sequential(nn.Linear(3, 4)))


def test_the_saved_plan_replayed_on_a_fresh_network_gives_the_architecture(tmp_path):
    from compress.plan import apply_plan

    small, plan, _ = compress(_net(), X, budget={"params": 0.6})
    fresh = apply_plan(_net(), Plan.from_json(json.dumps(json.loads(plan.to_json()))))
    assert [tuple(p.shape) for p in fresh.parameters()] == [tuple(p.shape) for p in small.parameters()]
