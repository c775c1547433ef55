"""Oracle: float64 products, and one number that float16 holds only behind the scale."""

import pytest

from kernels.operator import interpreter_fault

from .subprocesses import json_lines

pytest.importorskip("triton")


@pytest.mark.skipif(interpreter_fault() is not None, reason=interpreter_fault() or "")
def test_inputs_at_the_edge_of_what_the_kernels_take(tmp_path):
    """Addresses between words, float16 that only a scale brings back, taps far away."""
    lines = json_lines("edges", interpret=True, cache=tmp_path)
    assert [line for line in lines if not line["error"] <= line["tolerance"]] == []
    assert {"x", "values", "scale", "reach", "matrix", "convolution"} <= {word for line in lines for word in line["case"].split()}
