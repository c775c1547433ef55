"""Oracle: what was saved is what is loaded, bit for bit; a faulty file changes nothing; published accuracies of the CIFAR-10 ResNets."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import UserError
from models import build, find_weights, load_weights


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def network():
    return build("resnet20", 10, width=0.25)


@pytest.fixture
def good(network):
    torch.manual_seed(1)
    return {name: torch.randn_like(t) if t.is_floating_point() else torch.tensor(7) for name, t in network.state_dict().items()}


def test_loaded_values_are_the_saved_ones(network, good, tmp_path):
    save_file(good, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, good[name]) for name, tensor in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def test_half_precision_is_converted(network, good, tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in good.items()}
    save_file(half, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, half["conv1.weight"].float())


def test_batch_counters_may_be_absent(network, good, tmp_path):
    save_file({name: t for name, t in good.items() if not name.endswith("num_batches_tracked")}, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert torch.equal(network.linear.weight, good["linear.weight"])


def test_a_shared_tensor_needs_one_of_its_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    model = Tied()
    weight = torch.randn(3, 3)
    save_file({"second.weight": weight, "first.bias": torch.ones(3), "second.bias": torch.ones(3)}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.first.weight, weight)


def test_relative_names_are_looked_up_in_the_weights_folder(network, good, tmp_path, monkeypatch):
    save_file(good, tmp_path / "w.safetensors")
    monkeypatch.setenv("COMPRESS_WEIGHTS", str(tmp_path))
    assert find_weights("w.safetensors") == tmp_path / "w.safetensors"
    load_weights(network, "w.safetensors")
    assert torch.equal(network.conv1.weight, good["conv1.weight"])
    with pytest.raises(UserError, match="COMPRESS_WEIGHTS"):
        find_weights("other.safetensors")


def edited(change):
    def write(path, good):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, path)

    return write


def truncated(keep):
    def write(path, good):
        save_file(good, path)
        path.write_bytes(path.read_bytes()[:keep])

    return write


def set_nan(tensors):
    tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")


FAULTS = {
    "missing file": (lambda path, good: None, "was not found"),
    "folder": (lambda path, good: path.mkdir(), "is a folder"),
    "empty file": (lambda path, good: path.write_bytes(b""), "no complete safetensors"),
    "cut in the header": (truncated(100), "no complete safetensors"),
    "cut in the values": (truncated(-1), "no complete safetensors"),
    "text": (lambda path, good: path.write_text("not tensors at all"), "no complete safetensors"),
    "pickle": (lambda path, good: torch.save(good, path), "not a pickle"),
    "old pickle": (lambda path, good: path.write_bytes(pickle.dumps({"a": 1})), "not a pickle"),
    "missing name": (edited(lambda t: t.pop("layer2.1.bn1.weight")), "no tensor 'layer2.1.bn1.weight'"),
    "unexpected name": (edited(lambda t: t.update(extra=torch.ones(1))), "'extra', which the network does not have"),
    "prefixed name": (edited(lambda t: t.update({"module.conv1.weight": t.pop("conv1.weight")})), "(did you mean 'module.conv1.weight'?)"),
    "wrong shape": (edited(lambda t: t.update({"linear.bias": torch.ones(11)})), "'linear.bias'"),
    "integers": (edited(lambda t: t.update({"linear.bias": torch.ones(10, dtype=torch.int8)})), "torch.int8"),
    "not finite": (edited(set_nan), "'layer1.0.conv1.weight'"),
    "infinite in a buffer": (edited(lambda t: t["bn1.running_var"].fill_(float("inf"))), "'bn1.running_var'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_changes_nothing(fault, network, good, tmp_path):
    write, part = FAULTS[fault]
    path = tmp_path / "w.safetensors"
    write(path, good)
    before = state(network)
    with pytest.raises(UserError) as caught:
        load_weights(network, path)
    sentence = str(caught.value)
    assert part in sentence and str(path) in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_values_that_overflow_in_the_network_are_refused(network, good, tmp_path):
    good["conv1.weight"][0] = 1e6
    save_file(good, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"'conv1.weight'.*float16"):
        load_weights(network.half(), tmp_path / "w.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("COMPRESS_DATA") and os.environ.get("COMPRESS_WEIGHTS")), reason="needs COMPRESS_DATA and COMPRESS_WEIGHTS"
)
@pytest.mark.parametrize(("name", "accuracy"), [("resnet20", 0.9173), ("resnet32", 0.9263), ("resnet56", 0.9339)])
def test_published_accuracy_on_cifar10(name, accuracy):
    """Parameters by Y. Idelbayev (akamaster/pytorch_resnet_cifar10); normalised with ImageNet's mean and deviation."""
    from torchvision.datasets import CIFAR10

    test = CIFAR10(os.environ["COMPRESS_DATA"], train=False, download=False)
    images = torch.from_numpy(test.data).permute(0, 3, 1, 2)
    labels = torch.tensor(test.targets)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = build(name, 10).eval()
    load_weights(model, f"{name}_cifar10.safetensors")
    correct = 0
    with torch.no_grad():
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            correct += int((model((x / 255 - mean) / std).argmax(1) == y).sum())
    assert correct / len(labels) == pytest.approx(accuracy, abs=1e-4)
