"""Oracle: the training loop written out with torch's optimiser, loss and clipping; laws of what `fit` leaves behind."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.config import DataConfig, FinetuneConfig, TrainConfig
from compress.data import load_data
from compress.data.draws import derived_generator
from compress.errors import RunError, UserError
from compress.train import evaluate, fit
from tests.compress.train.helpers import small_bundle, small_network

DATA = small_bundle()
STEPS = 5  # 70 images in batches of 16, the last one of 6


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("distilled", [False, True])
def test_two_epochs_are_those_of_a_plain_loop(distilled):
    settings = {"epochs": 2, "lr": 0.1, "label_smoothing": 0.1, "grad_clip": 0.5, "weight_decay": 0.01}
    if distilled:
        settings["distill"] = {"temperature": 2.0, "weight": 0.7}
    cfg, teacher = FinetuneConfig(**settings), small_network(norm=True) if distilled else None
    mine, oracle = small_network(dropout=0), small_network(dropout=0)
    history = fit(mine, DATA, cfg, batch_size=16, seed=3, teacher=teacher)

    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)
    taught = teacher.eval() if teacher else None
    losses = []
    for epoch in range(2):
        generator = derived_generator(3, "epoch", epoch)
        for x, y in DATA.train.batches(16, generator=generator, augment=True, shuffle=True):
            logits = oracle(x)
            loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            if taught is not None:
                with torch.no_grad():
                    soft = F.log_softmax(taught(x) / 2, 1)
                loss = 0.3 * loss + 0.7 * 4 * F.kl_div(F.log_softmax(logits / 2, 1), soft, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            losses.append((loss.item() * len(y), len(y)))
    for (name, first), second in zip(mine.state_dict().items(), oracle.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6, msg=name)
    last = losses[STEPS:]
    assert history[1]["train_loss"] == pytest.approx(sum(loss for loss, _ in last) / 70, rel=1e-4)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 4 / 10)), rel=1e-6)
    val = evaluate(mine, DATA.val, 7)
    assert (history[1]["val_loss"], history[1]["val_accuracy"]) == (pytest.approx(val["loss"]), val["accuracy"])


def test_a_small_network_reads_digits():
    digits = load_data(DataConfig(), seed=0, device="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    fit(model, digits, TrainConfig(epochs=4, lr=0.1), batch_size=128, seed=0)
    assert evaluate(model, digits.test, 360)["accuracy"] > 0.93


def test_evaluate_is_the_mean_over_all_images_and_keeps_flags():
    model = small_network()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    result = evaluate(model, DATA.val, 7)
    assert [module.training for module in model.modules()] == flags
    ((x, y),) = DATA.val.batches(100)
    logits = model.eval()(x)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-6)
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item())


def test_nothing_else_is_touched():
    model, teacher = small_network().eval(), small_network().train()
    random, before = torch.get_rng_state(), weights(teacher)
    cfg = FinetuneConfig(epochs=1, distill={})
    fit(model, DATA, cfg, batch_size=16, seed=0, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules()) and all(module.training for module in teacher.modules())
    assert same(before, weights(teacher))
    assert all(parameter.grad is None for network in (model, teacher) for parameter in network.parameters())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_seed_decides_everything_and_the_global_seed_nothing():
    results = []
    for seed, outside in ((1, 5), (1, 6), (2, 5)):
        model = small_network(dropout=0.5)
        torch.manual_seed(outside)
        fit(model, DATA, TrainConfig(epochs=1), batch_size=16, seed=seed)
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class Failing(nn.Module):
    """Gives a loss, or only a gradient, that is not finite from the given training step on."""

    def __init__(self, step: int, gradient_only: bool) -> None:
        super().__init__()
        self.inner, self.step, self.gradient_only, self.calls = small_network(norm=False), step, gradient_only, 0

    def forward(self, x):
        self.calls += 1
        logits = self.inner(x)
        if self.calls < self.step:
            return logits
        # sqrt(0) is 0, and its derivative times zero is not a number.
        return logits + (logits.sum() * 0).sqrt() if self.gradient_only else logits * float("nan")


@pytest.mark.parametrize(("gradient_only", "what"), [(False, "loss is nan"), (True, "gradient norm is nan")])
def test_a_non_finite_step_changes_no_parameter(gradient_only, what):
    model, seen = Failing(3, gradient_only), []
    with pytest.raises(RunError, match=what) as error:
        cfg = TrainConfig(epochs=2, lr=0.25, schedule="constant", ema=0.9)
        fit(model, DATA, cfg, batch_size=16, seed=0, after_step=lambda: seen.append(weights(model)))
    assert "epoch 1, step 3 of 5" in str(error.value) and "0.25" in str(error.value) and "\n" not in str(error.value)
    assert len(seen) == 2 and same(seen[-1], weights(model)) and not same(seen[0], seen[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_best_validation_epoch_is_kept():
    model, calls = small_network(dropout=0), []

    def spoil():
        calls.append(1)
        if len(calls) > 8 * STEPS:
            model[-1].weight.data.zero_()

    cfg = TrainConfig(epochs=10, lr=0.05, optimizer="adam", weight_decay=0, select="val")
    history = fit(model, DATA, cfg, batch_size=16, seed=0, after_step=spoil)
    accuracies = [row["val_accuracy"] for row in history]
    assert max(accuracies) > accuracies[-1]
    assert evaluate(model, DATA.val, 20)["accuracy"] == max(accuracies)


def test_the_average_is_evaluated_and_kept():
    model, seen = small_network(dropout=0), [small_network()[-1].weight.detach().double()]
    cfg = TrainConfig(epochs=2, lr=0.1, ema=0.7)
    history = fit(model, DATA, cfg, batch_size=16, seed=0, after_step=lambda: seen.append(model[-1].weight.detach().double()))
    expected = seen[0]
    for t, weight in enumerate(seen[1:], 1):
        decay = min(0.7, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(model[-1].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert evaluate(model, DATA.val, 20)["loss"] == pytest.approx(history[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize(("steps", "rows"), [(3, 1), (5, 1), (7, 2), (1000, 2)])
def test_steps_are_capped_and_the_schedule_spans_them(steps, rows):
    calls = []
    history = fit(small_network(), DATA, TrainConfig(epochs=2), batch_size=16, seed=0, steps=steps, after_step=lambda: calls.append(1))
    total = min(steps, 2 * STEPS)
    assert (len(calls), len(history)) == (total, rows)
    assert history[-1]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * (total - 1) / total)))


def test_no_epochs_change_nothing(tmp_path):
    model = small_network()
    before = weights(model)
    assert fit(model, DATA, TrainConfig(epochs=0), batch_size=16, seed=0, checkpoint=tmp_path / "c.safetensors") == []
    assert same(before, weights(model)) and list(tmp_path.iterdir()) == []


def test_a_single_last_image_joins_the_batch_before_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])) if module.training else None)
    fit(model, small_bundle(train=33, val=0), TrainConfig(epochs=1), batch_size=16, seed=0)
    assert sizes == [16, 17]


def test_channels_last_and_bf16_stay_near_the_plain_training():
    results = {}
    for name, settings in {"plain": {}, "nhwc": {"channels_last": True}, "bf16": {"amp": "bf16"}}.items():
        model = small_network(dropout=0)
        kinds = []
        model[0].register_forward_hook(lambda module, inputs, output, kinds=kinds: kinds.append((output.dtype, inputs[0].is_contiguous())))
        fit(model, small_bundle(), TrainConfig(epochs=1, lr=0.01, **settings), batch_size=16, seed=0)
        results[name] = weights(model)
        assert kinds[0][0] == (torch.bfloat16 if name == "bf16" else torch.float32)
        assert all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in model.parameters())
    for name, tensor in results["plain"].items():
        torch.testing.assert_close(results["nhwc"][name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results["bf16"][name], tensor, rtol=0.1, atol=0.02)
    assert not same(results["bf16"], results["plain"])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: fit(small_network(), small_bundle(train=1, val=0), TrainConfig(), batch_size=4, seed=0), "has 1 training image"),
        (lambda: fit(small_network(), DATA, TrainConfig(), batch_size=1, seed=0), "BatchNorm cannot train"),
        (lambda: fit(small_network(), small_bundle(val=0), TrainConfig(select="val"), batch_size=4, seed=0), "no validation images"),
        (lambda: fit(small_network(), DATA, FinetuneConfig(distill={}), batch_size=4, seed=0), "no teacher"),
        (lambda: fit(nn.Flatten(), DATA, TrainConfig(), batch_size=4, seed=0), "no trainable parameter"),
        (lambda: fit(small_network(classes=2), DATA, TrainConfig(), batch_size=4, seed=0), r"shape \(4, 2\)"),
    ],
)
def test_impossible_trainings_are_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_compiled_training_is_near_the_plain_one():
    results = []
    for compiled in (False, True):
        model = small_network(dropout=0)
        fit(model, DATA, TrainConfig(epochs=2, lr=0.02, compile=compiled), batch_size=16, seed=0)
        results.append(weights(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4)
