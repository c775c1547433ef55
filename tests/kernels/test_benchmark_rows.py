"""Oracle: which cases a run must measure, by hand, given what its file holds; a worker that takes a known time."""

import json
import types

import pytest
import torch

from benchmarks import _timing
from benchmarks import kernels as gpu

CPU = torch.device("cpu")
FORMS = {"random": "run16 nibbles", "vectors": "vector_block 64", "blocks": "vector_block 64"}


class Worker:
    """Answers every case with the same times after `seconds` of a clock of its own; one that the limit cuts has failed."""

    def __init__(self, clock) -> None:
        self.clock, self.taken, self.jobs, self.fails, self.seconds = clock, 1.0, [], False, None

    def run(self, job: dict) -> dict:
        self.jobs.append(job)
        self.clock.now += min(self.taken, self.seconds)
        if self.taken > self.seconds:
            return {"failed": f"took longer than {self.seconds:g} seconds"}
        if self.fails:
            return {"failed": "ended the process (exit code 7)"}
        rivals = {"rival": {"us": 5.0, "p10": 5.0, "p90": 5.0, "ratio": 2.0}} if job["peers"] else {}
        return {name: {"us": 10.0, "p10": 10.0, "p90": 10.0, "ratio": 1.0} for name in ("dense", FORMS[job["pattern"]])} | rivals


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`run(*arguments)` measures the cases of one shape and gives the rows of the file; `versions` are those of the kernels."""
    clock = types.SimpleNamespace(now=0.0)
    found = types.SimpleNamespace(worker=Worker(clock), clock=clock, folder=tmp_path, versions={"vector_block": "a", "run16": "a", "two_four": "a"},
                                  plots=[])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(gpu, "version", lambda *formats: "".join(found.versions[f] for f in formats))
    monkeypatch.setattr(_timing, "copy_bandwidth", lambda device: 100.0)
    monkeypatch.setattr(_timing, "plot", lambda path, title, curves, bound=None: found.plots.append((path.name, curves)))

    def run(*given: str) -> list[dict]:
        found.worker.jobs.clear()
        options = gpu.arguments(["--part", "linear", "--shapes", "3072x768", "--columns", "8", "--sparsities", "0.5", "--out", str(tmp_path), *given])
        gpu.run(options, found.worker, CPU, "t", clock.now)
        path = tmp_path / "t.json"
        return json.loads(path.read_text())["rows"] if path.exists() else []

    found.run = run
    return found


def test_an_edited_kernel_is_measured_again_and_others_are_not(bench):
    assert [row["kernels"] for row in bench.run()] == ["aa", "a", "a"] and len(bench.worker.jobs) == 3
    bench.run()
    assert bench.worker.jobs == []
    bench.versions["vector_block"] = "b"
    rows = bench.run()
    assert [job["pattern"] for job in bench.worker.jobs] == ["vectors", "blocks"]
    assert [row["kernels"] for row in rows] == ["aa", "b", "b"] and not any("outdated" in row for row in rows)


def test_rows_of_earlier_kernels_are_marked_until_they_are_measured(bench):
    bench.run()
    bench.versions["vector_block"] = "b"
    bench.plots.clear()
    bench.worker.taken = 50.0
    rows = bench.run("--minutes", "1.5")
    assert [(row["pattern"], row.get("outdated", False)) for row in rows] == [("random", False), ("blocks", True), ("vectors", False)]
    table = (bench.folder / "t.md").read_text()
    assert "N 8, blocks, of an earlier version of the kernels | dense" in table and "N 8, vectors | dense" in table
    assert bench.plots == [("t_linear_vectors_8.png", {"3072x768": [(0.5, 1.0)]})]


def test_rivals_are_added_to_rows_without_them(bench):
    rows = bench.run("--no-peers")
    assert not any("rival" in row["times"] for row in rows)
    bench.run("--no-peers")
    assert bench.worker.jobs == []
    rows = bench.run()
    assert len(bench.worker.jobs) == 3 and all("rival" in row["times"] for row in rows) and len(rows) == 3
    bench.run("--no-peers")
    assert bench.worker.jobs == []


def test_rivals_that_end_the_process_do_not_take_the_rest(bench):
    """What was measured without them stays, says why they are missing, and is tried again only on request."""
    bench.run("--no-peers")
    bench.worker.fails = True
    rows = bench.run()
    assert all(row["rivals_failed"] == "ended the process (exit code 7)" and "dense" in row["times"] and "failed" not in row for row in rows)
    bench.run()
    assert bench.worker.jobs == []
    bench.worker.fails = False
    assert all("rival" in row["times"] and "rivals_failed" not in row for row in bench.run("--retry"))


def test_a_case_that_fails_with_edited_kernels_loses_its_old_times(bench):
    bench.run()
    bench.versions |= {"run16": "b", "vector_block": "b"}
    bench.worker.fails = True
    assert all(row["times"] == {} and row["failed"] for row in bench.run())


def test_more_tuning_measures_again(bench):
    bench.run("--tuning", "0")
    bench.run()
    assert len(bench.worker.jobs) == 3 and all(job["tuning"] == 30.0 for job in bench.worker.jobs)
    bench.run("--tuning", "0")
    assert bench.worker.jobs == []


def test_no_case_starts_that_would_not_end_in_time(bench):
    """Cases of 40 seconds: two end in 90 seconds, and the third would not."""
    bench.worker.taken = 40.0
    rows = bench.run("--minutes", "1.5")
    assert len(rows) == 2 and bench.clock.now == 80.0
    assert len(bench.run()) == 3 and len(bench.worker.jobs) == 1


def test_a_case_that_the_limit_cuts_is_no_failure(bench, capsys):
    bench.worker.taken = 100.0
    assert bench.run("--minutes", "1.5") == [] and bench.clock.now == 90.0
    assert "in the middle of a case" in capsys.readouterr().out
    # Its own limit is another matter.
    bench.worker.taken = gpu.CASE_SECONDS + 1
    rows = bench.run()
    assert len(rows) == 3 and all(row["failed"].startswith("took longer") for row in rows)


def test_plots_are_written_as_results_come(bench):
    class Cut(Exception):
        pass

    first = bench.worker.run

    def run(job):
        if job["pattern"] == "vectors":
            raise Cut
        return first(job)

    bench.worker.run = run
    with pytest.raises(Cut):
        bench.run()
    assert bench.plots == [("t_linear_random_8.png", {"3072x768": [(0.5, 1.0)]})]
