"""Oracle: the registry's own laws (what `info` says holds for `build`), and the sentences for wrong names, options and values."""

import pytest
import torch

from compress.errors import UserError
from models import build, info, names

DEFAULTS = [(name, {}) for name in names()] + [("vgg16", {"variant": "average"}), ("conv", {"image_size": 9})]


@pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=lambda value: str(value).replace(" ", ""))
def test_min_size_is_the_smallest_that_works(name, options):
    size = info(name, **options).min_size
    with torch.device("meta"):
        model = build(name, 7, 2, **options).eval()
    assert model(torch.empty(2, 2, size, size, device="meta")).shape == (2, 7)
    if size > 1:
        with pytest.raises(RuntimeError):
            model(torch.empty(2, 2, size - 1, size - 1, device="meta"))


@pytest.mark.parametrize("name", [name for name in names() if info(name).exact_size is None])
def test_larger_and_odd_images_are_accepted(name):
    size = info(name).min_size
    with torch.device("meta"):
        model = build(name, 7).eval()
    assert model(torch.empty(2, 3, size + 7, size + 12, device="meta")).shape == (2, 7)


def test_exact_size_is_the_only_one():
    with torch.device("meta"):
        model = build("conv", 10, 1, image_size=8)
    assert info("conv", image_size=8).exact_size == 8
    assert model(torch.empty(2, 1, 8, 8, device="meta")).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(torch.empty(2, 1, 9, 9, device="meta"))


def test_info_tells_family_and_options():
    facts = info("resnet32x4")
    assert (facts.family, facts.min_size, facts.exact_size) == ("resnet_cifar", 1, None)
    assert facts.options == {"width": 4, "shortcut": "conv", "skip_scale": False}
    assert info("vgg16").options["variant"] == "max"
    assert info("vgg16_plain").options["variant"] == "average"
    assert info("torchvision/vit_b_16").exact_size == 224


@pytest.mark.parametrize(("name", "small"), [("alexnet", 62), ("squeezenet1_1", 16), ("densenet121", 28), ("vgg11", 31)])
def test_torchvision_min_size(name, small):
    with torch.device("meta"):
        model = build(f"torchvision/{name}", 10, 1).eval()
    size = info(f"torchvision/{name}").min_size
    assert size == small + 1
    assert model(torch.empty(2, 1, size, size, device="meta")).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(torch.empty(2, 1, small, small, device="meta"))


def test_torchvision_options_reach_the_constructor():
    with torch.device("meta"):
        model = build("torchvision/mobilenet_v2", 10, width_mult=0.5)
    assert model.features[-1].out_channels == 1280
    assert model.features[1].conv[1].out_channels == 8


def test_googlenet_has_no_auxiliary_outputs():
    with torch.device("meta"):
        model = build("torchvision/googlenet", 10, 1).train()
    assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 10)


def test_the_same_seed_gives_the_same_weights_and_nothing_else_is_drawn():
    torch.manual_seed(5)
    first = build("resnet20", 10)
    after = torch.rand(1)
    torch.manual_seed(5)
    second = build("resnet20", 10)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


FAULTS = [
    (lambda: build("resnt20", 10), "'resnt20' (did you mean 'resnet20'?)"),
    (lambda: info("vgg61"), "'vgg61' (did you mean 'vgg"),
    (lambda: build("resnet20", 10, widht=2), "no option 'widht' (did you mean 'width'?)"),
    (lambda: info("resnet20", widht=2), "no option 'widht' (did you mean 'width'?)"),
    (lambda: build("resnet20", 10, depth=56), "no option 'depth'"),
    (lambda: build("dpn26", 10, width=2), "its options: none"),
    (lambda: build("resnet20", 10, shortcut="con"), "'con' (did you mean 'conv'?)"),
    (lambda: build("vgg16", 10, variant=3), "expected one of max, average"),
    (lambda: build("resnet20", 10, width=0), "'width' is 0"),
    (lambda: build("resnet20", 10, width="wide"), "'width' is 'wide'"),
    (lambda: build("resnet20", 10, width=float("nan")), "'width' is nan"),
    (lambda: build("resnet20", 0), "'num_classes' is 0"),
    (lambda: build("resnet20", 10, 1.5), "'in_channels' is 1.5"),
    (lambda: build("conv", 10, image_size=-1), "'image_size' is -1"),
    (lambda: info("conv", image_size="a"), "'image_size' is 'a'"),
    (lambda: build("torchvision/resnet19", 10), "'resnet19' (did you mean 'resnet18'?)"),
    (lambda: info("torchvision/resnet19"), "'resnet19' (did you mean 'resnet18'?)"),
    (lambda: build("torchvision/resnet18", 10, foo=1), "(foo=1)"),
    (lambda: build("torchvision/resnet18", 10, weights="DEFAULT"), "'weights'"),
    (lambda: build("torchvision/vit_b_16", 10, image_size=33), "(image_size=33)"),
    (lambda: info("torchvision/vit_b_16", image_size="large"), "'image_size' is 'large'"),
    (lambda: info("torchvision/maxvit_t", input_size=64), "'input_size'"),
]


@pytest.mark.parametrize(("call", "part"), FAULTS, ids=[part for _, part in FAULTS])
def test_faults_are_one_sentence(call, part):
    with pytest.raises(UserError) as caught:
        call()
    sentence = str(caught.value)
    assert part in sentence
    assert "\n" not in sentence and sentence.endswith(".")
