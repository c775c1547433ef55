"""Oracle: the exit codes and sentences that the command line promises."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress import cli, errors

ROOT = Path(__file__).resolve().parents[2]


def _main(tmp_path, capsys, *arguments, config=None):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config if config is not None else {"name": "x", "device": "cpu"}))
    code = cli.main(["--config_path", str(path), "--output_dir", str(tmp_path / "runs"), *arguments])
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("arguments", [(), ("--config_path",), ("--config_path", "a.json", "--resume", "--overwrite"), ("--config_path", "a.json", "--epochs", "3")])
def test_a_wrong_command_line_is_one_sentence_and_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(list(arguments))
    assert raised.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("main_prune.py: ")


def test_each_fault_has_a_line_and_nothing_is_written(tmp_path, capsys):
    code, lines = _main(tmp_path, capsys, "--set", "train.lr=-1", "--set", "sead=3", "--set", "prune.ratios=[1.5]")
    assert code == 2
    assert [words in line for words, line in zip(("sead", "train.lr", "prune.ratios"), sorted(lines, key=lambda l: "sead" not in l), strict=True)].count(True) >= 1
    assert len(lines) == 3 and all(line.startswith("main_prune.py: `") for line in lines)
    assert not (tmp_path / "runs").exists()


def test_resume_without_a_run_is_refused(tmp_path, capsys):
    code, lines = _main(tmp_path, capsys, "--resume")
    assert (code, len(lines)) == (2, 1) and "no run to continue" in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("error", "code"), [
    (errors.UserError("One.", "Two."), 2), (errors.RunError("Lost."), 3), (errors.Terminated("Stopped."), 143), (KeyboardInterrupt(), 130),
    (OSError(28, "No space left on device", "runs/x"), 3), (PermissionError(13, "Permission denied", "runs"), 3),
])
def test_every_kind_of_error_has_its_exit_code(tmp_path, capsys, monkeypatch, error, code):
    import compress.pipeline.run

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(compress.pipeline.run, "run", fail)
    got, lines = _main(tmp_path, capsys)
    assert got == code
    assert len(lines) == len(getattr(error, "faults", (error,)))
    assert all(line.startswith("main_prune.py: ") and line.endswith(".") for line in lines)


def test_sigterm_outside_of_a_training_is_one_sentence_and_exit_143(tmp_path, capsys, monkeypatch):
    import compress.pipeline.run

    def stopped(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("taken for a fault of the code that was running")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(compress.pipeline.run, "run", stopped)
    code, lines = _main(tmp_path, capsys)
    assert (code, len(lines)) == (143, 1) and "SIGTERM" in lines[0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_after_the_last_step_of_a_training_is_not_lost(tmp_path, capsys, monkeypatch):
    import compress.pipeline.run
    from compress.train.signals import StopRequest

    def stopped(*args, **kwargs):
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.received
        pytest.fail("went on")

    monkeypatch.setattr(compress.pipeline.run, "run", stopped)
    assert _main(tmp_path, capsys)[0] == 143


def test_a_wrong_configuration_is_reported_by_the_script_itself_before_torch_is_imported(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"trian": {}}')
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "main_prune.py"), "--config_path", str(path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": ""})
    sentences = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(sentences) == 1 and "did you mean 'train'" in sentences[0]
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())


def test_the_shipped_configurations_are_valid_and_hold_only_differences():
    from compress.config_file import load_config, to_json, validate

    load_config(ROOT / "config.json")
    defaults = to_json(validate({}))

    def repeated(given, default, path):
        for key, value in given.items():
            if isinstance(value, dict) and isinstance(default.get(key), dict):
                yield from repeated(value, default[key], f"{path}{key}.")
            elif key in default and default[key] == value:
                yield f"{path}{key}"

    files = sorted((ROOT / "configs").rglob("*.json"))
    for file in files:
        raw = json.loads(file.read_text())
        if "prune" in raw and "experiment" not in raw:
            load_config(file)
            assert list(repeated(raw, defaults, "")) == [], file
