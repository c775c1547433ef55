"""Oracle: the machine code that ptxas makes for sm_80, sm_90 and sm_100, read with cuobjdump and nvdisasm (no GPU needed)."""

import pytest

from .subprocesses import json_lines

pytest.importorskip("triton")
INSTRUCTIONS_PER_NONZERO = {0: 12, 1: 10}


KERNELS = ("run16", "vector_block", "sparse_conv", "compact")


def check(lines: list[dict], kernels: tuple[str, ...]) -> None:
    assert {line["kernel"] for line in lines} >= set(kernels)
    assert {line["capability"] for line in lines} == {80, 90, 100}
    assert [line for line in lines if line["stack"] or line["local"]] == [], "spilled registers"
    assert [line for line in lines if line["registers"] > 255 or line["registers"] * line["threads"] > 65536] == []
    assert [line for line in lines if line["shared"] > line["shared_limit"]] == []
    counted = [line for line in lines if line.get("per_nonzero") is not None and line["kind"] == "bf16"]
    assert "run16" not in kernels or {(line["coding"], line["capability"]) for line in counted} >= {(0, 90), (1, 90)}
    assert [line for line in counted if not 5 < line["per_nonzero"] <= INSTRUCTIONS_PER_NONZERO[line["coding"]]] == []
    assert all(line["counted"] for line in lines if line["kernel"] == "compact"), "no population count instruction"
    hopper = [line for line in lines if line["kernel"] in ("vector_block", "sparse_conv") and line["capability"] == 90
              and line["kind"] in ("bf16", "fp16")]
    assert hopper or not {"vector_block", "sparse_conv"} & set(kernels)
    assert all(line["wgmma"] and line["cp_async"] for line in hopper)


def test_representative_configurations(tmp_path):
    check(json_lines("aot", "default", interpret=False, cache=tmp_path), KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration(kernel, tmp_path):
    check(json_lines("aot", "all", kernel, interpret=False, cache=tmp_path, timeout=7200), (kernel,))
