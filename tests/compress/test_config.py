"""Oracle: a table of 100 malformed configurations, each with the words that its sentence must hold."""

import json

import pytest

from compress.config import Config
from compress.config_file import apply_override, load_config, to_json, validate
from compress.errors import UserError

# (path of the faulty value, the value, words of the sentence)
FAULTS = [
    ("nam", "x", "did you mean 'name'"), ("sead", 1, "did you mean 'seed'"), ("dat", {}, "did you mean 'data'"), ("modle", {}, "did you mean 'model'"),
    ("training", {}, "did you mean 'train'"), ("pruning", {}, "did you mean 'prune'"), ("fine_tune", {}, "did you mean 'finetune'"),
    ("benchmarks", {}, "did you mean 'benchmark'"), ("xyzzy", 1, "known at the top level"),
    ("name", "", "run name"), ("name", "../up", "run name"), ("name", "a/b", "run name"), ("name", "a b", "run name"), ("name", 3, "string"), ("name", None, "string"),
    ("name", ".hidden", "run name"),
    ("seed", -1, "greater than or equal to 0"), ("seed", 1.5, "integer"), ("seed", "0", "integer"), ("seed", 2**31, "less than"), ("seed", True, "integer"),
    ("device", "gpu", "device"), ("device", "cuda:x", "device"), ("device", 0, "string"), ("threads", 0, "greater than"), ("threads", "2", "integer"), ("threads", 10**9, "less than"),
    ("deterministic", 1, "boolean"), ("deterministic", "yes", "boolean"),
    ("data", None, "object with keys"), ("data", [], "object with keys"), ("data", "cifar10", "object with keys"),
    ("data.nam", "digits", "did you mean 'name'"), ("data.name", 3, "string"), ("data.name", None, "string"),
    ("data.root", 3, "string"), ("data.download", "true", "boolean"), ("data.batch_size", 0, "greater than"), ("data.batch_size", -5, "greater than"),
    ("data.batch_size", 12.5, "integer"), ("data.batch_size", "128", "integer"), ("data.batchsize", 128, "did you mean 'batch_size'"),
    ("data.eval_batch_size", 0, "greater than"), ("data.val_fraction", 1.0, "less than 1"), ("data.val_fraction", -0.1, "greater than"),
    ("data.val_fraction", "10%", "number"), ("data.train_images", 1, "greater than"), ("data.crop_padding", -1, "greater than"), ("data.flip", "no", "boolean"),
    ("data.mean", 0.5, "list"), ("data.mean", ["a"], "number"), ("data.std", [0.0], "above 0"), ("data.std", [-1.0, 1.0, 1.0], "above 0"),
    ("data.image_size", 2, "greater than"), ("data.workers", -1, "greater than"),
    ("model", "resnet20", "object with keys"), ("model.nam", "x", "did you mean 'name'"), ("model.options", [], "object"), ("model.options", "width=2", "object"),
    ("model.weights", 5, "string"), ("model.import", "module", "package.module:function"), ("model.import", "a:b:c", "package.module:function"),
    ("model.import", ":f", "package.module:function"), ("model.import_path", "a:b", "did you mean"),
    ("train.epoch", 3, "did you mean 'epochs'"), ("train.epochs", -1, "greater than"), ("train.epochs", 2.5, "integer"), ("train.epochs", "10", "integer"),
    ("train.optimizer", "SGD", "'sgd'"), ("train.optimizer", "adagrad", "'adam'"), ("train.lr", 0, "greater than 0"), ("train.lr", -0.1, "greater than 0"),
    ("train.lr", "1e-3", "number"), ("train.lr", None, "number"), ("train.learning_rate", 0.1, "known in `train`"), ("train.momentum", 1.0, "less than 1"),
    ("train.momentum", -0.1, "greater than"), ("train.nesterov", "on", "boolean"), ("train.weight_decay", -1e-4, "greater than"),
    ("train.schedule", "step", "'multistep'"), ("train.milestones", [0.75, 0.5], "increasing"), ("train.milestones", [60, 120], "fractions"),
    ("train.milestones", 0.5, "list"), ("train.gamma", 0, "greater than 0"), ("train.gamma", 2, "less than or equal"), ("train.warmup_epochs", -1, "greater than"),
    ("train.label_smoothing", 1.0, "less than 1"), ("train.ema", 1.0, "less than 1"), ("train.amp", "fp16", "'bf16'"), ("train.amp", True, "'bf16'"),
    ("train.grad_clip", 0, "greater than 0"), ("train.select", "best", "'val'"), ("train.distill", {}, "known in `train`"),
    ("finetune.distill", True, "object with keys"), ("finetune.distill.temp", 4, "did you mean 'temperature'"), ("finetune.distill.temperature", 0, "greater than 0"),
    ("finetune.distill.weight", 1.5, "less than or equal to 1"),
    ("prune.method", "l1", "did you mean 'methods'"), ("prune.methods", "l1", "list"), ("prune.methods", [], "at least 1"), ("prune.methods", [1], "string"),
    ("prune.methods", ["l1", "l1"], "twice"), ("prune.ratio", 0.5, "did you mean 'ratios'"), ("prune.ratios", 0.5, "list"), ("prune.ratios", [], "at least 1"),
    ("prune.ratios", [50], "write 0.5 for 50 percent"), ("prune.ratios", [1.0], "[0, 1)"), ("prune.ratios", [-0.5], "[0, 1)"), ("prune.ratios", ["0.5"], "number"),
    ("prune.ratios", [0.5, 0.5], "twice"), ("prune.budget", "flops", "'macs'"), ("prune.budget", {"macs": 0.5}, "'macs'"),
    ("prune.allocation", "layerwise", "'uniform'"), ("prune.max_layer_ratio", 1.0, "less than 1"), ("prune.max_layer_ratio", 0, "greater than 0"),
    ("prune.round_to", 0, "greater than"), ("prune.exclude", "fc", "list"), ("prune.exclude", [3], "string"), ("prune.calibration_images", 0, "greater than"),
    ("prune.recalibration_images", -1, "greater than"), ("prune.seeds", [], "at least 1"), ("prune.seeds", [0, 0], "twice"), ("prune.seeds", 0, "list"),
    ("prune.seeds", [-1], "greater than"), ("prune.seeds", [2**70], "less than"),
    ("prune.method_options", {"l1": 3}, "object"), ("prune.verify", "yes", "boolean"),
    ("benchmark", False, "object with keys"), ("benchmark.batch_size", 0, "greater than"), ("benchmark.seconds", 0, "greater than"), ("benchmark.threads", 0, "greater than"),
]


def _nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(("path", "value", "words"), FAULTS, ids=[f"{path}={json.dumps(value)}" for path, value, _ in FAULTS])
def test_a_malformed_configuration_gives_one_sentence_naming_the_place(path, value, words):
    with pytest.raises(UserError) as raised:
        validate(_nested(path, value))
    assert len(raised.value.faults) == 1
    sentence = raised.value.faults[0]
    assert words in sentence
    assert path.split(".")[0] in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_there_are_a_hundred_faults():
    assert len(FAULTS) >= 100


def test_several_faults_are_reported_together():
    with pytest.raises(UserError) as raised:
        validate({"seed": -1, "train": {"lr": 0}, "prune": {"ratios": [7]}})
    assert [fault.split("`")[1] for fault in raised.value.faults] == ["seed", "train.lr", "prune.ratios"]


@pytest.mark.parametrize(("content", "words"), [
    (b"", "line 1, column 1"), (b"{", "not valid JSON"), (b"[]", "a list"), (b"3", "a number"), (b'"x"', "text"), (b"null", "null"),
    (b'{"seed": 1,}', "not valid JSON"), (b'{"seed": NaN}', "NaN"), (b'{"seed": Infinity}', "Infinity"), (b'{"seed": 1, "seed": 2}', "twice"),
    (b'{"train": {"lr": 1, "lr": 2}}', "'lr' twice"), (b"\xff\xfe{}", "UTF-8"), (b"{'seed': 1}", "not valid JSON"), (b"[" * 100_000, "nested too deeply"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "number"), (b"seed: 1", "not valid JSON"), (b'{"seed": 1} x', "not valid JSON"),
])
def test_a_damaged_file_gives_one_sentence(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert load_config(path).seed == 3


def test_missing_files_and_folders_are_named(tmp_path):
    for path, words in ((tmp_path / "none.json", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=words):
            load_config(path)


def test_overrides_are_json_or_text_and_reach_nested_keys():
    raw = {"train": {"epochs": 1}}
    for override in ("train.epochs=7", "name=abc", "prune.ratios=[0.25, 0.5]", "finetune.distill.temperature=2", "data.root=null"):
        apply_override(raw, override)
    config = validate(raw)
    assert (config.train.epochs, config.name, config.prune.ratios, config.finetune.distill.temperature) == (7, "abc", [0.25, 0.5], 2.0)
    assert config.data.root is None


@pytest.mark.parametrize(("override", "words"), [
    ("train.epochs", "path.to.key=value"), ("=3", "path.to.key=value"), ("train..epochs=3", "path.to.key=value"), ("name.x=1", "not an object"),
    ("train.epochs=NaN", "NaN"), ("train.epochs=abc", None),
])
def test_a_wrong_override_gives_one_sentence(override, words):
    raw = {"name": "a"}
    with pytest.raises(UserError) as raised:
        apply_override(raw, override)
        validate(raw)
    assert (words or "`train.epochs`") in str(raised.value)


def test_the_resolved_configuration_is_a_fixed_point():
    first = to_json(validate({"model": {"import": "a.b:c"}, "finetune": {"distill": {}}}))
    assert to_json(validate(first)) == first
    assert first["model"]["import"] == "a.b:c"


def test_every_field_has_a_description_and_a_default():
    def walk(section):
        for name, field in section.model_fields.items():
            assert field.description, name
            assert not field.is_required(), name
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(kind, "model_fields"):
                    walk(kind)

    walk(Config)
