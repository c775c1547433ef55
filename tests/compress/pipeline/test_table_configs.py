"""Oracle: the published hyper-parameters of EigenDamage and Improved EigenDamage, copied literally from their sources' tables."""

from pathlib import Path

import pytest

from compress.config_file import load_config
from compress.decompose.improved import ImprovedOptions
from compress.methods import METHODS
from compress.pipeline.checks import check
from compress.pipeline.phases import phases
from compress.train.optim import learning_rate

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "eigendamage_table"
EIGENDAMAGE = ["published_eigendamage", "published_eigendamage_pool", "published_eigendamage_iterative", "published_eigendamage_depthwise"]
PUBLISHED = [*EIGENDAMAGE, "published_channels", "published_improved"]


def config(name):
    return load_config(FOLDER / f"{name}.json")


def options(name):
    prune = config(name).prune
    (method,) = prune.methods
    return METHODS[method].options(prune.method_options[method])


def rates(name, phase, epochs):
    """Learning rate at the start of these epochs of the fine-tuning after a phase."""
    chosen = config(name)
    tuning = phases(chosen, chosen.prune.methods[0], chosen.prune.ratios[-1])[phase].tuning(chosen.finetune)
    return pytest.approx([learning_rate(tuning, epoch * 10, tuning.epochs * 10, 10) for epoch in epochs])


@pytest.mark.parametrize("name", [*PUBLISHED, "shared"])
def test_every_ratio_can_be_reached(name):
    chosen = config(name)
    assert check(chosen).graph.count()[0] == 7_451_044 and max(chosen.prune.ratios) >= 0.9


@pytest.mark.parametrize("name", PUBLISHED)
def test_network_data_and_base_training(name):
    chosen = config(name)
    assert (chosen.data.name, chosen.model.name, chosen.prune.budget) == ("cifar100", "resnet32x4", "params")
    assert (chosen.train.optimizer, chosen.train.momentum, chosen.train.nesterov, chosen.train.lr) == ("sgd", 0.9, False, 0.1)
    assert (chosen.train.schedule, chosen.train.milestones, chosen.train.gamma) == ("multistep", [0.5, 0.75], 0.1)
    assert (chosen.train.epochs, chosen.data.batch_size, chosen.train.weight_decay) == (200, 128, 2e-4)
    # nothing is held out, and statistics come from all 50,000 images
    assert (chosen.data.val_fraction, chosen.prune.calibration_images) == (0.0, 50000)


@pytest.mark.parametrize("name", [*EIGENDAMAGE, "published_channels"])
def test_fine_tuning_of_eigendamage(name):
    tuning = config(name).finetune
    assert (tuning.epochs, tuning.batch_size, tuning.weight_decay) == (150, 64, 1e-4)
    assert (tuning.optimizer, tuning.momentum, tuning.nesterov, tuning.gamma, tuning.distill) == ("sgd", 0.9, False, 0.1, None)
    peak = 1e-4 if name == "published_eigendamage_depthwise" else 1e-3
    assert [peak, peak, peak / 10, peak / 10, peak / 100, peak / 100] == rates(name, 0, [0, 74, 75, 111, 113, 149])


@pytest.mark.parametrize("name", EIGENDAMAGE)
def test_options_of_eigendamage(name):
    chosen = options(name)
    assert (chosen.fisher, chosen.samples, chosen.normalize, chosen.use_patch, chosen.fix_rotation) == ("true", 1, False, True, False)
    assert (chosen.ekfac, chosen.accept, chosen.skip_last) == (False, "params", True)
    assert chosen.cap == (0.5 if name == "published_eigendamage_iterative" else 0.95)
    assert chosen.depthwise == (name == "published_eigendamage_depthwise")


def test_ratios_rounds_and_pool_fractions_of_eigendamage():
    for name in ("published_eigendamage", "published_eigendamage_depthwise"):
        assert config(name).prune.ratios == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9] and not options(name).stepwise
        assert len(phases(config(name), config(name).prune.methods[0], 0.9)) == 1
    iterative = options("published_eigendamage_iterative")
    assert (iterative.rounds, iterative.pool_fraction, iterative.stepwise) == (7, 0.5, True)
    pool = options("published_eigendamage_pool")
    assert (pool.pool_fraction, pool.rounds, config("published_eigendamage_pool").prune.rounds) == (0.9, None, 1)


def test_options_of_improved_eigendamage():
    chosen, prune = options("published_improved"), config("published_improved").prune
    assert (chosen.pool_fraction, chosen.stepwise, chosen.cap, chosen.rounds) == (0.2, True, 0.5, 50)  # 100 iterations: a cut or a growth each
    assert (chosen.normalize, chosen.fisher, chosen.use_patch, chosen.spatial, chosen.skip_last) == (False, "true", True, "none", False)
    assert (chosen.eigenvalues, chosen.damping, chosen.moving_average, chosen.training_mode) == ("first_batch", 1e-3, 0.9, True)
    assert (chosen.decomposition, chosen.back_ratio, chosen.pool_momentum, chosen.growth) == ("tucker", 0.25, 0.5, "copy")
    assert (chosen.allow_increase, chosen.accept, prune.calibration_batch_size) == ("auto", "params", 256)
    assert prune.ratios == [0.5, 0.7, 0.8, 0.9]
    assert ImprovedOptions.published().model_dump().items() >= {
        key: value for key, value in chosen.model_dump().items() if key not in ("rounds", "growth_milestones", "pool_fraction", "allow_increase")}.items()


def test_fine_tuning_of_improved_eigendamage():
    tuning = config("published_improved").finetune
    assert (tuning.epochs, tuning.batch_size, tuning.weight_decay, tuning.distill) == (200, 256, 5e-4, None)
    assert (tuning.optimizer, tuning.momentum, tuning.nesterov) == ("sgd", 0.9, False)
    assert [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5] == rates("published_improved", 0, [0, 99, 100, 149, 150, 199])
    assert [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5] == rates("published_improved", 1, [0, 49, 50, 99, 100, 149, 150, 199])


def test_every_file_is_described_and_published_ratios_are_in_the_readme():
    text = (FOLDER / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in FOLDER.glob("*.json"))
    assert "| Improved EigenDamage | 78.19 | 77.50 | 76.23 | 76.20 | 74.93 |" in text
