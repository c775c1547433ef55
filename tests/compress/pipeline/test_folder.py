"""Oracle: the rules of the run folder, played through on a temporary folder."""

import json
import multiprocessing

import pytest

from compress.errors import UserError
from compress.pipeline.folder import RunFolder, difference, digest


def _run(path, config=None):
    return RunFolder(path / "r", config or {"name": "r", "prune": {"ratios": [0.5]}})


def test_a_new_run_writes_its_configuration_and_the_same_configuration_continues(tmp_path):
    with _run(tmp_path).open("auto") as folder:
        assert json.loads((folder.path / "resolved.json").read_text()) == folder.config
        folder.begin("base", "k")
        folder.finish("base", "k", {"accuracy": 0.5})
    for mode in ("auto", "resume"):
        with _run(tmp_path).open(mode) as folder:
            assert folder.result("base", "k") == {"accuracy": 0.5}
            assert folder.result("base", "other") is None


def test_another_configuration_is_refused_naming_the_first_difference_and_nothing_changes(tmp_path):
    with _run(tmp_path).open("auto"):
        pass
    other = _run(tmp_path, {"name": "r", "prune": {"ratios": [0.7]}})
    for mode in ("auto", "resume"):
        with pytest.raises(UserError, match=r"`prune.ratios` is \[0.5\] there and \[0.7\] now"), other.open(mode):
            pass
    assert json.loads((tmp_path / "r" / "resolved.json").read_text())["prune"]["ratios"] == [0.5]


def test_overwrite_starts_over_and_resume_refuses_to_start(tmp_path):
    with pytest.raises(UserError, match="no run to continue"), _run(tmp_path).open("resume"):
        pass
    assert not (tmp_path / "r").exists()
    with _run(tmp_path).open("auto") as folder:
        folder.begin("base", "k")
        folder.finish("base", "k", 1)
    with _run(tmp_path, {"name": "r"}).open("overwrite") as folder:
        assert folder.result("base", "k") is None
        assert not folder.stage("base").exists()


def test_a_folder_that_is_no_run_is_never_touched(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("precious")
    for mode in ("auto", "overwrite"):
        with pytest.raises(UserError, match="not a run folder"), _run(tmp_path).open(mode):
            pass
    assert (tmp_path / "r" / "thesis.tex").read_text() == "precious"


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(UserError, match="is a file"), _run(tmp_path).open("auto"):
        pass


def test_a_damaged_stage_record_counts_as_not_done(tmp_path):
    with _run(tmp_path).open("auto") as folder:
        folder.begin("base", "k")
        folder.finish("base", "k", 1)
        (folder.stage("base") / "stage.json").write_text('{"key": "k", "res')
        assert folder.result("base", "k") is None


def test_a_stage_whose_files_are_lost_or_changed_counts_as_not_done(tmp_path):
    with _run(tmp_path).open("auto") as folder:
        weights = folder.begin("base", "k") / "weights"
        weights.write_bytes(b"abc")
        folder.finish("base", "k", 1, ["weights"])
        assert folder.result("base", "k") == 1
        for damage in (lambda: weights.write_bytes(b"abd"), lambda: weights.write_bytes(b""), weights.unlink):
            damage()
            assert folder.result("base", "k") is None


def test_an_interrupted_overwrite_leaves_a_run_folder(tmp_path, monkeypatch):
    with _run(tmp_path).open("auto") as folder:
        folder.finish("base", "k", 1)
        folder.finish("another", "k", 1)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt), _run(tmp_path).open("overwrite"):
        pass
    monkeypatch.undo()
    with _run(tmp_path, {"name": "r"}).open("overwrite") as folder:
        assert folder.result("base", "k") is None


def test_begin_keeps_the_work_of_the_same_stage_and_removes_that_of_another(tmp_path):
    with _run(tmp_path).open("auto") as folder:
        (folder.begin("e", "k") / "checkpoint").write_text("half")
        assert (folder.begin("e", "k") / "checkpoint").read_text() == "half"
        assert not (folder.begin("e", "other") / "checkpoint").exists()


def _try_open(path, queue):
    try:
        with _run(path).open("auto"):
            queue.put("opened")
    except UserError as error:
        queue.put(str(error))


def test_a_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with _run(tmp_path).open("auto"):
        process = context.Process(target=_try_open, args=(tmp_path, queue))
        process.start()
        assert "Another process" in queue.get(timeout=30)
        process.join()


def test_digest_depends_on_values_not_on_key_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_difference_finds_missing_keys_and_nested_values():
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert difference({"a": {"b": 1}}, {"a": {}}) == "`a.b` is 1 there and null now"
