"""Oracle: float64 dense products of the same masked weights.

The Triton kernels run in Triton's interpreter, in a process of their own, every buffer between guard bands and every output filled with
NaN beforehand; on Linux a read or write beyond them ends that process. Shapes, masks, dtypes, epilogues and kernel options are drawn per case number.
"""

import signal
from collections import Counter

import pytest

from kernels.operator import interpreter_fault

from .guarded import PROTECTS
from .subprocesses import json_lines, started

KERNELS = ("run16", "vector_block", "sparse_conv", "two_four", "compact")

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreter_fault() is not None, reason=interpreter_fault() or "")


def check(lines: list[dict], count: int, kernels: tuple[str, ...]) -> None:
    cases = [line for line in lines if "case" in line]
    launches = {line["kernel"]: line["launches"] for line in lines if "launches" in line}
    counts = Counter(case["kernel"] for case in cases)
    assert counts == dict.fromkeys(kernels, count) and set(launches) == set(kernels)
    assert all(n >= count // 2 for n in launches.values()), launches
    assert [case for case in cases if not case["error"] <= case["tolerance"]] == []
    assert [case for case in cases if not case["same"]] == []


def test_thirty_cases_per_kernel(tmp_path):
    check(json_lines("interpreted", "30", *KERNELS, interpret=True, cache=tmp_path), 30, KERNELS)


@pytest.mark.skipif(not PROTECTS, reason="needs Linux")
@pytest.mark.parametrize("first, count, killed", [(36, 64, False), (37, 64, True), (-1, 1, True)])
def test_a_read_outside_a_buffer_is_found_though_its_result_is_thrown_away(first, count, killed, tmp_path):
    done = started("outside", str(first), str(count), interpret=True, cache=tmp_path)
    assert done.returncode == (-signal.SIGSEGV if killed else 0), done.stderr[-4000:]
    assert ("Segmentation fault" in done.stderr) == killed


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_three_hundred_cases_per_kernel(kernel, tmp_path):
    check(json_lines("interpreted", "300", kernel, interpret=True, cache=tmp_path), 300, (kernel,))
