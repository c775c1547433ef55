"""Oracle: float64 dense products of the same masked weights.

The Triton kernels run in Triton's interpreter, in a process of their own, every buffer between guard bands and every output filled with
NaN beforehand. Shapes, masks, dtypes, epilogues and kernel options are drawn per case number.
"""

from collections import Counter

import pytest

from kernels.operator import interpreter_fault

from .subprocesses import json_lines

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


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_three_hundred_cases_per_kernel(kernel, tmp_path):
    check(json_lines("interpreted", "300", kernel, interpret=True, cache=tmp_path), 300, (kernel,))
