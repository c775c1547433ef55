"""Oracle: the outputs of the stored networks beside those of the stored base network."""

import pytest

from compress import load
from compress.data import load_data
from compress.errors import UserError
from compress.pipeline.run import dry_run, run
from models import build, load_weights

from .test_rounds import config


def test_a_run_fits_the_layers_to_the_base_network_in_every_round(tmp_path):
    missed = {}
    for images in (0, 128):
        chosen = config("l1", 0.4, {}, "train.epochs=1", "finetune.epochs=0", "prune.recalibration_images=0", f"prune.reconstruction_images={images}", "prune.rounds=2")
        folder = run(chosen, tmp_path / str(images), log=lambda line: None)
        x = next(iter(load_data(chosen.data, seed=0, device="cpu").test.batches(64)))[0]
        network = build("resnet20", 10, width=0.5, in_channels=1)
        load_weights(network, folder / "base" / "model.safetensors")
        base, small = (model.eval()(x) for model in (network, load(folder / "l1-params0.4-s0")))
        missed[images] = ((small - base).square().sum() / base.square().sum()).item()
    assert missed[128] < 0.5 * missed[0]


def test_masks_are_refused_before_anything_is_written(tmp_path):
    chosen = config("mask_magnitude", 0.5, {}, "prune.budget=weights", "prune.reconstruction_images=64")
    for action in (lambda: run(chosen, tmp_path, log=lambda line: None), lambda: dry_run(chosen, log=lambda line: None)):
        with pytest.raises(UserError, match="reconstruction_images.*makes masks") as error:
            action()
        assert len(error.value.faults) == 1 and list(tmp_path.iterdir()) == []
